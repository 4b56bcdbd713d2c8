// Through bf16: one update that only grows, c(t) D, and what checkpoints in bfloat16 make of it.
explorables.bf16 = (() => {
  "use strict";
  const { add, decode, frobenius, fromBf16, fromFloat16, rounded, shareUnchanged, simK, stableRank, svd, topRight } =
    explorables.linalg;
  const { PROGRESS, UNIT, choice, html, mount, note, number, panel } = explorables.stage;
  const { percent, share, slider, squares, svg, teller, ticks, timeline, worker } = explorables.stage;
  const { arms: stored, block, k, origins, progress, shown, sizes } = explorables.data.weights;

  const w0 = decode(origins.anchor, fromBf16, block, block);
  const arms = stored
    .filter((arm) => arm.course)
    .map((arm) => {
      const update = decode(arm.update, fromFloat16, block, block, arm.unit);
      const found = svd(update);
      return { ...arm, update, found, rank: stableRank(found), trained: frobenius(update) / frobenius(w0) };
    });
  const last = progress.length - 1;

  // The course of an arm's update that ends at a relative norm: each snapshot is computed when it is first asked for.
  const courseOf = (arm, size) => {
    const whole = (size * frobenius(w0)) / frobenius(arm.update);
    const known = [];
    const look = (t) => {
      const exact = arm.update.map((column) => column.map((x) => whole * arm.course[t] * x));
      const w1 = add(w0, exact);
      const seen = add(rounded(w1), w0, -1);
      const found = svd(seen, t === last ? arm.found.v : at(last).found.v);
      const end = t === last ? found : at(last).found;
      const numbers = {
        size: size * arm.course[t],
        unchanged: shareUnchanged(w0, w1),
        rank: { exact: arm.rank, seen: stableRank(found) },
        // A direction that does not change is its own end.
        sim: { exact: 1, seen: simK(topRight(found, k), topRight(end, k)) },
      };
      return { exact, seen, found, numbers };
    };
    const at = (t) => (known[t] ??= look(t));
    // Pairs of progress and a number, of the snapshots that are known.
    const points = (key, view) =>
      progress.flatMap((when, t) => (known[t] ? [[when, known[t].numbers[key][view]]] : []));
    return { at, points };
  };

  // The numbers at a snapshot, of an arm whose update ends at a position of the slider over sizes.
  const at = (name, position, t) => courseOf(arms.find((arm) => arm.name === name), sizes[position]).at(t).numbers;

  const draw = (stage) => {
    const y = { low: 1, high: 32, log: true, ticks: ticks(String, 1, 2, 4, 8, 16, 32) };
    const panels = {
      rank: panel({ title: "stable rank", x: PROGRESS, y }),
      sim: panel({ title: `similarity to the end, K = ${k}`, x: PROGRESS, y: UNIT }),
    };
    const exact = squares("the update in float32"), seen = squares("the update between bfloat16 checkpoints");
    const said = teller();
    const work = worker();
    const gap = (size, arm) => Math.abs(Math.log(size / arm.trained));
    const asTrained = (arm) => sizes.reduce((best, size, i) => (gap(size, arm) < gap(sizes[best], arm) ? i : best), 0);
    let arm = arms[0], position = asTrained(arm), t = progress.findIndex((when) => when >= 0.2), course;

    const show = () => {
      for (const [key, { clear, line, place, upright }] of Object.entries(panels)) {
        const stroke = { stroke: arm.colour, "stroke-width": 2.5 };
        const defined = course.points(key, "seen").filter(([, value]) => !Number.isNaN(value));
        const dots = defined.map(([when, value]) => {
          const [cx, cy] = place(when, value);
          return svg("circle", { cx, cy, r: when === progress[t] ? 6 : 3, fill: arm.colour, class: "mark" });
        });
        clear(
          upright(progress[t]),
          line(course.points(key, "exact"), { ...stroke, "stroke-dasharray": "6 4" }),
          line(course.points(key, "seen"), stroke),
          ...dots,
        );
      }
    };
    const move = () => {
      const now = course.at(t);
      const { size, unchanged, rank, sim } = now.numbers;
      const largest = (3 * frobenius(now.exact)) / block;
      exact.draw(now.exact, largest);
      seen.draw(now.seen, largest);
      show();
      said.textContent =
        `At ${percent(progress[t])} of the training the update has ${percent(size)} of the weights' norm, and ` +
        `${share(unchanged)} of the weights are unchanged. Stable rank: ${number(rank.exact, 1)} in float32, ` +
        `${number(rank.seen, 1)} through bf16. Similarity to the end: ${number(sim.exact, 2)} in float32, ` +
        `${number(sim.seen, 2)} through bf16.`;
    };
    const begin = () => {
      course = courseOf(arm, sizes[position]);
      move();
      // The other snapshots, from the last to the first, while the reader does nothing.
      const others = progress.map((_, i) => last - i);
      work(others.map((i) => () => { course.at(i); show(); }));
    };
    const size = slider({
      label: "size at the end",
      positions: sizes.map((relative) => `${percent(relative)} of the weights' norm`),
      start: position,
      moved: (to) => { position = to; begin(); },
    });
    const time = timeline(progress, t, (to) => { t = to; move(); });
    const which = choice({
      label: "whose update, and its size as trained",
      options: arms.map((one) => ({ value: one.name, text: `${one.label}, ${percent(one.trained)}`, arm: one })),
      start: arm.name,
      chosen: (name) => {
        arm = arms.find((one) => one.name === name);
        position = asTrained(arm);
        size.set(position);
        begin();
      },
    });
    const card = (title, { canvas }) => html("div", { class: "explorable-card" }, html("div", {}, title), canvas);
    const cards = [card("in float32 (dashed)", exact), card("through bf16 (solid)", seen)];
    stage.append(
      html("div", { class: "explorable-controls" }, which, size.root, time.root),
      html("div", { class: "explorable-cards" }, ...cards),
      html("div", { class: "explorable-panels two" }, panels.rank.root, panels.sim.root),
      said,
      note(shown),
    );
    begin();
  };

  mount("bf16", draw);
  return { at };
})();
