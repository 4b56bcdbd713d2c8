// Nothing here is needed for reading: it spares a reader code in the way and dark paper.
(() => {
  "use strict";

  // The code behind figures and tables is a reader's to ask for, by one switch for the page.
  const root = document.documentElement;
  root.classList.add("code-folded");
  addEventListener("DOMContentLoaded", () => {
    const heading = document.querySelector(".bd-article h1");
    if (!heading || !document.querySelector(".tag_hide-input > details")) return;
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox" });
    box.addEventListener("change", () => root.classList.toggle("code-folded", !box.checked));
    label.append(box, " Show the code behind figures and tables");
    label.className = "code-switch";
    heading.after(label);
  });

  // Paper is white, whatever the theme of the screen, and cannot be clicked: solutions are printed unfolded.
  let onScreen = null;
  const turn = (toPaper) => {
    if (toPaper && onScreen === null) {
      onScreen = root.dataset.theme;
      root.dataset.theme = "light";
      for (const solution of document.querySelectorAll("details.solution, .tag_hide-cell details")) solution.open = true;
    } else if (!toPaper && onScreen !== null) {
      root.dataset.theme = onScreen;
      onScreen = null;
    }
  };
  addEventListener("beforeprint", () => turn(true));
  addEventListener("afterprint", () => turn(false));
  matchMedia("print").addEventListener("change", (event) => turn(event.matches));
})();
