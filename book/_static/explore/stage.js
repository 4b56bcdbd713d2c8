// What the pictures that move share: the place where they stand, their controls, and axes with lines and marks.
// A picture is drawn by a function that is handed the stage, an empty element in the place of the still.
explorables.stage = (() => {
  "use strict";

  const made = (namespace) => (name, attributes = {}, ...children) => {
    const element = document.createElementNS(namespace, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const html = made("http://www.w3.org/1999/xhtml");
  const svg = made("http://www.w3.org/2000/svg");

  // Draw in every figure of this name, and hide its still once that has succeeded.
  const mount = (name, draw) => {
    const begin = () => {
      for (const figure of document.querySelectorAll(`figure.explorable[data-name=${name}]`)) {
        const stage = html("div", { class: "explorable-stage" });
        figure.querySelector("figcaption").before(stage);
        draw(stage);
        figure.classList.add("moves");
        // It is hidden, so nothing else would fetch it before the page is printed.
        figure.querySelector("img").loading = "eager";
      }
    };
    if (document.readyState === "loading") addEventListener("DOMContentLoaded", begin);
    else begin();
  };

  // --- controls ------------------------------------------------------------------------------------------------------

  let count = 0;

  // A slider over positions, each of which is told in words, to screen readers too.
  const slider = ({ label, positions, start, moved }) => {
    const id = `explorable-${++count}`;
    const input = html("input", { id, type: "range", min: 0, max: positions.length - 1, value: start });
    const said = html("output", { for: id, "aria-live": "off" }); // the slider itself tells its value
    const say = () => {
      said.textContent = positions[input.value];
      input.setAttribute("aria-valuetext", positions[input.value]);
    };
    input.addEventListener("input", () => {
      say();
      moved(Number(input.value));
    });
    say();
    // Put it to a position, or to the nearest that it has, without a call of moved.
    const set = (position) => {
      input.value = position;
      say();
    };
    const root = html("div", { class: "explorable-slider" }, html("label", { for: id }, label), input, said);
    return { root, set, position: () => Number(input.value) };
  };

  // One of several, as radio buttons; those of arms have the arm's sign, so that they are a legend, too.
  const choice = ({ label, options, start, chosen }) => {
    const name = `explorable-${++count}`;
    const buttons = options.map(({ value, text, arm }) => {
      const input = html("input", { type: "radio", name, value });
      input.checked = value === start;
      input.addEventListener("change", () => chosen(value));
      return html("label", {}, input, " ", ...(arm ? [sign(arm)] : []), text);
    });
    return html("fieldset", { class: "explorable-choice" }, html("legend", {}, label), ...buttons);
  };

  // What a move has changed, in a sentence that screen readers read out when it has settled.
  const teller = () => html("p", { class: "explorable-said", "aria-live": "polite" });

  // What the picture is of.
  const note = (shown) => html("p", { class: "explorable-note" }, `Shown: ${shown}.`);

  // --- axes ----------------------------------------------------------------------------------------------------------

  const MARKS = {
    o: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",
    s: "M-4.5,-4.5H4.5V4.5H-4.5Z",
    D: "M0,-6L6,0L0,6L-6,0Z",
    "^": "M0,-6L6,5H-6Z",
    v: "M0,6L6,-5H-6Z",
    P: "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    X: "M-5,-2.5L-2.5,-5L0,-2.5L2.5,-5L5,-2.5L2.5,0L5,2.5L2.5,5L0,2.5L-2.5,5L-5,2.5L-2.5,0Z",
  };

  const mark = (arm, x = 0, y = 0) =>
    svg("path", { d: MARKS[arm.marker], fill: arm.colour, transform: `translate(${x},${y})`, class: "mark" });

  // The sign of an arm for a table or a legend.
  const sign = (arm) =>
    svg("svg", { class: "explorable-sign", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, mark(arm));

  // A panel with a title and two axes, {low, high, log, ticks: [[value, text], ...], label}; what it shows is told
  // elsewhere in words.
  const panel = ({ title, x, y, width = 240, height = 200 }) => {
    const box = { left: 52, right: width - 24, top: 30, bottom: height - 44 };
    const scale = ({ low, high, log }, from, to) => {
      const on = log ? Math.log : (value) => value;
      return (value) => from + ((on(value) - on(low)) / (on(high) - on(low))) * (to - from);
    };
    const across = scale(x, box.left, box.right);
    const up = scale(y, box.bottom, box.top);
    const content = svg("g");
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "explorable-panel", "aria-hidden": "true" });
    root.append(svg("text", { x: 4, y: 16, class: "title" }, title));
    for (const [value, text] of x.ticks) {
      const at = across(value);
      root.append(svg("line", { x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4, class: "axis" }));
      root.append(svg("text", { x: at, y: box.bottom + 19, "text-anchor": "middle" }, text));
    }
    for (const [value, text] of y.ticks) {
      const at = up(value);
      root.append(svg("line", { x1: box.left, x2: box.right, y1: at, y2: at, class: "grid" }));
      root.append(svg("text", { x: box.left - 6, y: at + 5, "text-anchor": "end" }, text));
    }
    root.append(svg("path", { d: `M${box.left},${box.top}V${box.bottom}H${box.right}`, class: "axis" }));
    const middle = (box.left + box.right) / 2;
    root.append(svg("text", { x: middle, y: height - 6, "text-anchor": "middle" }, x.label), content);
    const inside = (value, { low, high }) => Math.min(high, Math.max(low, value));
    // Where a point stands; what leaves the panel stands at its edge.
    const place = (a, b) => [across(inside(a, x)), up(inside(b, y))];
    return {
      root,
      place,
      // A line through points; it has a gap where one is not a number.
      line: (points, attributes) => {
        const steps = points.map(([a, b], i) => {
          if (Number.isNaN(b)) return "";
          return `${i && !Number.isNaN(points[i - 1][1]) ? "L" : "M"}${place(a, b).map((value) => value.toFixed(1))}`;
        });
        return svg("path", { fill: "none", d: steps.join(""), ...attributes });
      },
      // The line that says where the slider is.
      upright: (a) => svg("line", { x1: across(a), x2: across(a), y1: box.top, y2: box.bottom, class: "now" }),
      clear: (...children) => content.replaceChildren(...children),
    };
  };

  // A matrix as coloured squares: positive is red, negative is blue, and what is near zero lets the page shine through.
  const squares = (label) => {
    const canvas = html("canvas", { class: "explorable-squares", role: "img", "aria-label": label });
    const draw = (columns, largest) => {
      [canvas.width, canvas.height] = [columns.length, columns[0].length];
      const picture = new ImageData(canvas.width, canvas.height);
      columns.forEach((column, j) =>
        column.forEach((value, i) => {
          const colour = value > 0 ? [213, 60, 0] : [0, 114, 178];
          picture.data.set([...colour, 255 * Math.min(1, Math.abs(value) / largest)], 4 * (i * columns.length + j));
        }),
      );
      canvas.getContext("2d").putImageData(picture, 0, 0);
    };
    return { canvas, draw };
  };

  // --- work that takes longer than a move may ------------------------------------------------------------------------

  const idly = globalThis.requestIdleCallback ?? setTimeout;

  // Do a list of tasks one by one while nothing else is to be done; begun anew, it forgets the list before.
  const worker = () => {
    let latest = 0;
    return (tasks) => {
      const mine = ++latest;
      const next = (i) => {
        if (mine !== latest || i === tasks.length) return;
        tasks[i]();
        idly(() => next(i + 1));
      };
      idly(() => next(0));
    };
  };

  // --- numbers in words, with a space that does not break ------------------------------------------------------------

  const percent = (share) => `${Number((100 * share).toPrecision(2))}\u00a0%`;
  const share = (part) => `${(100 * part).toFixed(1)}\u00a0%`;
  const number = (value, digits) => (Number.isNaN(value) ? "not defined" : value.toFixed(digits));

  // The axis of the training's progress, and one from 0 to 1.
  const ticks = (word, ...values) => values.map((value) => [value, word(value)]);
  const PROGRESS = { low: 0, high: 1, label: "share of the training", ticks: ticks(percent, 0, 0.5, 1) };
  const UNIT = { low: 0, high: 1, ticks: ticks(String, 0, 0.25, 0.5, 0.75, 1) };

  // A slider over the training, of which each position is a share.
  const timeline = (progress, start, moved) =>
    slider({ label: "how far the training is", positions: progress.map(percent), start, moved });

  return {
    PROGRESS, UNIT, choice, html, mark, mount, note, number, panel, percent, share, sign, slider, squares, svg, teller,
    ticks, timeline, worker,
  };
})();
