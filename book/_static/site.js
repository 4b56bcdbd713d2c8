// Nothing here is needed for reading: it spares a reader waits and dark paper.
(() => {
  "use strict";

  // All frames of a figure that is stepped through are fetched when it comes near, so that no step waits for one.
  const coming = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        coming.unobserve(target);
        for (const frame of target.querySelectorAll("img[loading=lazy]")) frame.loading = "eager";
      }
    },
    { rootMargin: "600px" },
  );
  addEventListener("DOMContentLoaded", () => {
    for (const figure of document.querySelectorAll(".steppable")) coming.observe(figure);
  });

  // Paper is white, whatever the theme of the screen, and cannot be clicked: solutions are printed unfolded.
  const root = document.documentElement;
  let onScreen = null;
  const turn = (toPaper) => {
    if (toPaper && onScreen === null) {
      onScreen = root.dataset.theme;
      root.dataset.theme = "light";
      for (const solution of document.querySelectorAll(".tag_hide-cell details")) solution.open = true;
    } else if (!toPaper && onScreen !== null) {
      root.dataset.theme = onScreen;
      onScreen = null;
    }
  };
  addEventListener("beforeprint", () => turn(true));
  addEventListener("afterprint", () => turn(false));
  matchMedia("print").addEventListener("change", (event) => turn(event.matches));
})();
