// The size of the update: the updates of all arms at the size that each was trained to, or at one size for all.
explorables.size = (() => {
  "use strict";
  const { add, decode, frobenius, fromBf16, fromFloat16, lowMagnitude, mean, overlap } = explorables.linalg;
  const { principalAngles, shareUnchanged, svd, topRight } = explorables.linalg;
  const { choice, html, mark, mount, note, panel, percent, share } = explorables.stage;
  const { sign, slider, teller, ticks, worker } = explorables.stage;
  const { alpha, arms: stored, block, k, origins: texts, shown, sizes } = explorables.data.weights;

  const origins = Object.fromEntries(
    Object.entries(texts).map(([name, text]) => {
      const w0 = decode(text, fromBf16, block, block);
      return [name, { w0, norm: frobenius(w0), low: lowMagnitude(w0, alpha), found: svd(w0) }];
    }),
  );
  const arms = stored.map((arm) => {
    const update = decode(arm.update, fromFloat16, block, block, arm.unit);
    const origin = origins[arm.origin];
    return { ...arm, update, origin, norm: frobenius(update), trained: frobenius(update) / origin.norm };
  });

  // What the update of one arm does to its origin at a relative norm.
  const measure = ({ origin, update, norm }, size) => {
    const w1 = add(origin.w0, update, (size * origin.norm) / norm);
    const turned = svd(w1, origin.found.v);
    return {
      size,
      unchanged: shareUnchanged(origin.w0, w1),
      overlap: overlap(origin.low, origin.w0, w1),
      angle: mean(principalAngles(topRight(origin.found, k), topRight(turned, k))),
    };
  };
  // The numbers of all arms at a position of the slider, or at their own sizes if there is none.
  const at = (position = null) =>
    Object.fromEntries(arms.map((arm) => [arm.name, measure(arm, position === null ? arm.trained : sizes[position])]));

  const across = {
    low: sizes[0],
    high: sizes.at(-1),
    log: true,
    label: "size of the update, in %",
    ticks: ticks((size) => String(Number((100 * size).toPrecision(1))), 0.0003, 0.001, 0.003, 0.01, 0.03),
  };
  const VIEWS = [
    {
      key: "unchanged",
      head: "unchanged",
      title: "unchanged in bf16",
      y: { low: 0, high: 1, ticks: ticks(percent, 0, 0.25, 0.5, 0.75, 1) },
    },
    {
      key: "overlap",
      head: "on small",
      title: `on the smallest ${percent(alpha)}`,
      y: { low: alpha, high: 1, ticks: ticks(percent, 0.3, 0.5, 0.7, 0.9) },
    },
    {
      key: "angle",
      head: "turned",
      title: `top ${k} directions turned by`,
      y: { low: 0.005, high: 20, log: true, ticks: ticks((angle) => `${angle}°`, 0.01, 0.1, 1, 10) },
    },
  ];
  const angle = (degrees) => `${Number(degrees.toPrecision(2))}°`;
  const TOLD = { size: percent, unchanged: share, overlap: share, angle };

  // Matched SFT is the arm to compare OPD with; what is dashed has learned nothing.
  const strokeOf = ({ name, colour }) => ({
    stroke: colour,
    "stroke-width": name === "sft_matched" ? 3 : 1.5,
    "stroke-dasharray": name === "opd_shuffled" ? "5 4" : "none",
  });

  const draw = (stage) => {
    const panels = VIEWS.map(({ title, y }) => panel({ title, x: across, y }));
    const curves = new Map(arms.map((arm) => [arm, []]));
    const cells = arms.map(() => Object.keys(TOLD).map(() => html("td")));
    let position = null, now = at();

    const show = () =>
      VIEWS.forEach(({ key }, i) => {
        const { line, place, upright, clear } = panels[i];
        const lines = arms.map((arm) => line(curves.get(arm).map((found) => [found.size, found[key]]), strokeOf(arm)));
        // What comes first in the table stands in front.
        const marks = [...arms].reverse().map((arm) => mark(arm, ...place(now[arm.name].size, now[arm.name][key])));
        clear(...lines, ...(position === null ? [] : [upright(sizes[position])]), ...marks);
      });

    const said = teller();
    const move = (to) => {
      position = to;
      now = at(position);
      show();
      arms.forEach(({ name }, i) =>
        Object.entries(TOLD).forEach(([key, tell], j) => (cells[i][j].textContent = tell(now[name][key]))),
      );
      const span = (key) => {
        const values = arms.map(({ name }) => now[name][key]);
        return `${TOLD[key](Math.min(...values))} to ${TOLD[key](Math.max(...values))}`;
      };
      const where = position === null ? "As trained" : `At ${percent(sizes[position])} for all`;
      said.textContent =
        `${where}: ${span("unchanged")} unchanged, ${span("overlap")} of the changes on small weights, ` +
        `top directions turned by ${span("angle")}.`;
    };
    const size = slider({
      label: "size for all",
      positions: sizes.map((size) => `${percent(size)} of the weights' norm`),
      start: Math.floor(sizes.length / 2),
      moved: (to) => {
        which.querySelector("[value=one]").checked = true;
        move(to);
      },
    });
    const which = choice({
      label: "sizes",
      options: [
        { value: "own", text: "as trained" },
        { value: "one", text: "one size for all" },
      ],
      start: "own",
      chosen: (value) => move(value === "own" ? null : size.position()),
    });
    const heads = ["update", "size", ...VIEWS.map(({ head }) => head)];
    const top = html("thead", {}, html("tr", {}, ...heads.map((head) => html("th", { scope: "col" }, head))));
    const rows = arms.map((arm, i) =>
      html("tr", { class: arm.name }, html("th", { scope: "row" }, sign(arm), arm.label), ...cells[i]),
    );
    stage.append(
      html("div", { class: "explorable-controls" }, which, size.root),
      html("div", { class: "explorable-panels" }, ...panels.map(({ root }) => root)),
      html("table", { class: "explorable-numbers" }, top, html("tbody", {}, ...rows)),
      said,
      note(shown),
    );
    move(null);
    // The curves that the marks run along, point by point while the reader does nothing.
    worker()(
      sizes.map((size, i) => () => {
        if (i % 3) return;
        for (const arm of arms) curves.get(arm).push(measure(arm, size));
        show();
      }),
    );
  };

  mount("size", draw);
  return { at };
})();
