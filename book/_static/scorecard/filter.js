// The table of claims gets three choices above it. Without this script all its rows are there.
(() => {
  "use strict";

  const start = () => {
    const table = document.querySelector("table.scorecard");
    if (!table) return;
    const rows = [...table.tBodies[0].rows];

    const form = document.createElement("form");
    form.className = "scorecard-filter";
    form.setAttribute("aria-label", "Which claims are shown");
    const choose = (name, label, options) => {
      const select = document.createElement("select");
      select.name = name;
      for (const [value, text] of options) select.add(new Option(text, value));
      const around = document.createElement("label");
      around.append(label, select);
      form.append(around);
    };
    const told = (key) => [...new Set(rows.map((row) => row.dataset[key]).filter(Boolean))].map((text) => [text, text]);
    choose("finding", "Finding", [["", "all"], ...told("finding")]);
    choose("model", "Model", [["toy", "toy model"], ["real", "real model"]]);
    const verdicts = new Map([...told("toy"), ...told("real")]);
    choose("verdict", "Verdict", [["", "all"], ...verdicts]);
    const again = document.createElement("button");
    again.type = "reset";
    again.textContent = "Show all";
    form.append(again);
    const count = document.createElement("p");
    count.setAttribute("role", "status");
    form.append(count);

    const filter = () => {
      const { finding, model, verdict } = Object.fromEntries(new FormData(form));
      for (const row of rows) {
        const found = row.dataset[model];
        row.hidden = !found || (finding && finding !== row.dataset.finding) || (verdict && verdict !== found);
      }
      count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} claims`;
    };
    form.addEventListener("change", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    // The choices have their first values only after the event.
    form.addEventListener("reset", () => setTimeout(filter));
    table.before(form);
    filter();
  };

  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
