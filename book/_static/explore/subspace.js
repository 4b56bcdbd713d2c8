// The subspace of the update over training: in float32, between bf16 checkpoints, and of the locked null between these.
explorables.subspace = (() => {
  "use strict";
  const { PROGRESS, UNIT, choice, html, mark, mount, note, number, panel, percent, squares, teller, timeline } =
    explorables.stage;
  const { arms, k, progress, shown } = explorables.data.subspace;
  const VIEWS = { float32: "in float32", bf16: "through bf16", locked: "locked null, through bf16" };

  const ofViews = (tell) => Object.fromEntries(Object.keys(VIEWS).map((view) => [view, tell(view)]));

  // Sim_K to the end of all arms in the three views at a snapshot.
  const at = (t) => Object.fromEntries(arms.map((arm) => [arm.name, ofViews((view) => arm[view].sim[t])]));

  // Squared cosines of the directions at a snapshot (rows) and at the end, as columns, in steps of 1/255.
  const bytes = Object.fromEntries(arms.map((arm) => [arm.name, ofViews((view) => atob(arm[view].squares))]));
  const cosines = (name, view, t) => {
    const entry = (i, j) => bytes[name][view].charCodeAt((t * k + i) * k + j) / 255;
    return Array.from({ length: k }, (_, j) => Float64Array.from({ length: k }, (_, i) => entry(i, j)));
  };

  const draw = (stage) => {
    const views = Object.entries(VIEWS).map(([view, title]) => ({
      view,
      drawn: panel({ title, x: PROGRESS, y: UNIT }),
      square: squares(`squared cosines of the directions now and at the end, ${title}`),
      value: html("div"),
    }));
    const said = teller();
    let chosen = arms.find((arm) => arm.name === "opd"), t = progress.findIndex((when) => when >= 0.2);

    const move = () => {
      const now = at(t);
      for (const { view, drawn, square, value } of views) {
        const lines = arms.map((arm) => {
          const points = arm[view].sim.map((sim, i) => [progress[i], sim]);
          return drawn.line(points, { stroke: arm.colour, "stroke-width": arm === chosen ? 3.5 : 1.5 });
        });
        const marks = arms
          .filter((arm) => !Number.isNaN(now[arm.name][view]))
          .map((arm) => mark(arm, ...drawn.place(progress[t], now[arm.name][view])));
        drawn.clear(drawn.upright(progress[t]), ...lines, ...marks);
        square.draw(cosines(chosen.name, view, t), 1);
        value.textContent = `Sim = ${number(now[chosen.name][view], 2)}`;
      }
      const { float32, bf16, locked } = ofViews((view) => number(now[chosen.name][view], 2));
      said.textContent =
        `${chosen.label} at ${percent(progress[t])} of the training: similarity to the end ${float32} in float32, ` +
        `${bf16} through bf16, and ${locked} for the locked null.`;
    };
    const time = timeline(progress, t, (to) => { t = to; move(); });
    const which = choice({
      label: "squares and thick line",
      options: arms.map((arm) => ({ value: arm.name, text: arm.label, arm })),
      start: chosen.name,
      chosen: (name) => { chosen = arms.find((arm) => arm.name === name); move(); },
    });
    const cards = views.map(({ drawn, square, value }) =>
      html("div", { class: "explorable-card" }, drawn.root, square.canvas, value),
    );
    const key =
      `In the squares, a row is one of the ${k} leading input directions now, a column one at the end; the stronger ` +
      "the colour, the nearer they are.";
    stage.append(
      html("div", { class: "explorable-controls" }, which, time.root),
      html("div", { class: "explorable-panels" }, ...cards),
      html("p", {}, key),
      said,
      note(shown),
    );
    move();
  };

  mount("subspace", draw);
  return { at, cosines };
})();
