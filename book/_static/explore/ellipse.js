// An update of a matrix of two by two: where it takes the unit circle, and what becomes of the singular directions.
explorables.ellipse = (() => {
  "use strict";
  const { add, frobenius, multiply, principalAngles, stableRank, svd, topRight, transpose } = explorables.linalg;
  const { html, mount, number, percent, slider, svg, teller } = explorables.stage;

  // As columns, as everywhere: it takes (1, 0) to the first and (0, 1) to the second.
  const W0 = [Float64Array.of(1.4, 0.5), Float64Array.of(0.3, 0.8)];
  const [ACROSS, UP] = [Float64Array.of(1, 0), Float64Array.of(0, 1)];
  const GRAIN = 20; // positions of a slider to one
  const STEPS = Array.from({ length: 33 }, (_, i) => (i - 16) / GRAIN);

  // What an update does, given its four entries row by row.
  const at = (entries) => {
    const update = [Float64Array.of(entries[0], entries[2]), Float64Array.of(entries[1], entries[3])];
    const w1 = add(W0, update);
    const before = { right: svd(W0), left: svd(transpose(W0)) }, after = { right: svd(w1), left: svd(transpose(w1)) };
    const turned = (side) => principalAngles(topRight(before[side], 1), topRight(after[side], 1))[0];
    const shift = Math.hypot(...after.right.s.map((value, i) => value - before.right.s[i]));
    return {
      w1,
      before,
      after,
      values: after.right.s,
      norm: frobenius(update) / frobenius(W0),
      drift: shift / frobenius(W0),
      rank: stableRank(svd(update)),
      right: turned("right"),
      left: turned("left"),
    };
  };

  const UNIT = 50, WIDTH = 260, HEIGHT = 240; // in units of the drawing
  const MIDDLE = `translate(${WIDTH / 2},${HEIGHT / 2 + 10})`;
  const board = (title) => {
    const content = svg("g", { transform: MIDDLE });
    const heading = svg("text", { x: 4, y: 16, class: "title" }, title);
    const view = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "explorable-panel", "aria-hidden": "true" };
    return { root: svg("svg", view, heading, content), content };
  };
  const spot = ([x, y]) => [UNIT * x, -UNIT * y];
  const image = (matrix, kind) => {
    const turn = (i) => Float64Array.of(Math.cos((i * Math.PI) / 36), Math.sin((i * Math.PI) / 36));
    const points = multiply(matrix, Array.from({ length: 72 }, (_, i) => turn(i)));
    const corners = points.map((point) => spot(point).map((x) => x.toFixed(1)));
    return svg("path", { d: `M${corners.join("L")}Z`, class: kind });
  };
  const axis = (direction, size, kind) => {
    const [x, y] = spot(direction);
    return svg("line", { x1: -size * x, y1: -size * y, x2: size * x, y2: size * y, class: kind });
  };
  const name = (point, text) => {
    const [x, y] = spot(point);
    return svg("text", { x: x * 1.16 - 4, y: y * 1.16 + 5 }, text);
  };

  const draw = (stage) => {
    const inputs = board("inputs: the unit circle"), outputs = board("outputs: where it goes");
    const said = teller();
    const entries = [0, 0, 0, 0];
    const set = (i, entry) => {
      sliders[i].set(Math.round(GRAIN * entry) + (STEPS.length - 1) / 2);
      entries[i] = STEPS[sliders[i].position()];
    };

    // The points that (1, 0) and (0, 1) go to can be dragged; so they stay in the page when the rest is drawn anew.
    const handles = [0, 1].map((j) => {
      const number = svg("text", { y: 4, class: "on-handle" }, String(j + 1));
      const handle = svg("g", {}, svg("circle", { r: 9, class: "handle" }), number);
      handle.addEventListener("pointerdown", (event) => {
        handle.setPointerCapture(event.pointerId);
        event.preventDefault();
      });
      handle.addEventListener("pointermove", (event) => {
        if (!handle.hasPointerCapture(event.pointerId)) return;
        const screen = outputs.content.getScreenCTM().inverse();
        const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(screen);
        set(j, x / UNIT - W0[j][0]);
        set(2 + j, -y / UNIT - W0[j][1]);
        move();
      });
      return handle;
    });

    outputs.root.append(svg("g", { transform: MIDDLE }, ...handles));

    const move = () => {
      const { w1, before, after, values, norm, drift, rank, right, left } = at(entries);
      const axes = (found, sizes, kinds) => found.v.map((direction, i) => axis(direction, sizes[i], kinds[i]));
      const [now, then] = [["first", "second"], ["first before", "second before"]];
      inputs.content.replaceChildren(
        image([ACROSS, UP], "after"),
        ...axes(before.right, [1, 1], then),
        ...axes(after.right, [1, 1], now),
        name(ACROSS, "1"),
        name(UP, "2"),
      );
      outputs.content.replaceChildren(
        image(W0, "before"),
        image(w1, "after"),
        ...axes(before.left, before.left.s, then),
        ...axes(after.left, values, now),
      );
      handles.forEach((handle, j) => handle.setAttribute("transform", `translate(${spot(w1[j])})`));
      const degrees = (angle) => (Number.isNaN(angle) ? "not defined" : `${angle.toFixed(1)}°`);
      said.textContent =
        `The update has ${percent(norm)} of the weights' norm, and the singular values move by ${percent(drift)} of ` +
        `that norm. The first direction turns by ${degrees(right)} among the inputs and by ${degrees(left)} among ` +
        `the outputs. The update's stable rank: ${number(rank, 2)}.`;
    };

    const sliders = [1, 2].flatMap((output) =>
      [1, 2].map((input) =>
        slider({
          label: `from input ${input} to output ${output}`,
          positions: STEPS.map((step) => step.toFixed(2).replace("-", "−")),
          start: (STEPS.length - 1) / 2,
          moved: (to) => {
            entries[2 * (output - 1) + input - 1] = STEPS[to];
            move();
          },
        }),
      ),
    );
    const preset = (text, wanted) => {
      const button = html("button", { type: "button", class: "explorable-button" }, text);
      button.addEventListener("click", () => {
        wanted.forEach((entry, i) => set(i, entry));
        move();
      });
      return button;
    };
    // u v^T of an output direction and the first input direction, row by row.
    const v = svd(W0).v[0];
    const u = multiply(W0, [v])[0].map((x) => x / svd(W0).s[0]);
    const outer = (direction, size) => [0, 1].flatMap((i) => [0, 1].map((j) => size * direction[i] * v[j]));
    const presets = [
      preset("no update", [0, 0, 0, 0]),
      preset("along the first direction", outer(u, 0.7)),
      preset("across it", outer([-u[1], u[0]], 0.7)),
      preset("alike in all directions", [0.4, 0, 0, 0.4]),
    ];
    const how =
      "Drag the points 1 and 2, which are where the inputs 1 and 2 go, or move the sliders, which are the entries of " +
      "the update. Dashed is before the update. The first singular direction is red, the second blue.";
    stage.append(
      html("div", { class: "explorable-buttons" }, ...presets),
      html("div", { class: "explorable-panels two" }, inputs.root, outputs.root),
      html("p", {}, how),
      html("div", { class: "explorable-panels two" }, ...sliders.map(({ root }) => root)),
      said,
    );
    presets[2].click();
  };

  mount("ellipse", draw);
  return { at };
})();
