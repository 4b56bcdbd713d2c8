// A token: what student and teacher would write in its place, and the credit that each method gives it.
explorables.token = (() => {
  "use strict";
  const { choice, html, mount, percent, teller } = explorables.stage;
  const { answer, completions, end, prompt } = explorables.data.token;

  // Credits of the token at a place of a completion, by method; SFT's is that of a text which it is given to imitate.
  const at = (completion, place) => {
    const { rlvr, tokens } = completions[completion];
    return { sft: 1, rlvr, opd: tokens[place].teacher - tokens[place].student };
  };

  const FULL = 2; // credit at which a colour is full
  const written = (token) => (token === end ? "end" : token);
  const chance = (p) => (p < 0.0001 ? "under 0.01\u00a0%" : percent(Number(p.toFixed(4))));
  const signed = (credit) => `${credit < 0 ? "−" : "+"}${Math.abs(credit).toFixed(2)}`;

  const bars = (title, top, token) => {
    const rows = top.map(([other, p]) =>
      html(
        "tr",
        other === token ? { class: "written" } : {},
        html("th", { scope: "row" }, written(other)),
        html("td", {}, html("span", { class: "bar", style: `width: ${(60 * p).toFixed(1)}%` }), ` ${chance(p)}`),
      ),
    );
    return html("table", { class: "explorable-bars" }, html("caption", {}, title), html("tbody", {}, ...rows));
  };

  const draw = (stage) => {
    const said = teller();
    const tops = html("div", { class: "explorable-panels two" });
    let method = "opd", chosen = null;

    // A button a token; one of all is reached by Tab, the others from it by the arrow keys.
    const buttons = completions.map(({ tokens }, i) =>
      tokens.map(({ token }, t) => {
        const button = html("button", { type: "button", class: "explorable-token", tabindex: -1 }, written(token));
        button.addEventListener("pointerenter", () => look(i, t));
        button.addEventListener("focus", () => look(i, t));
        button.addEventListener("keydown", (event) => {
          const place = { ArrowRight: t + 1, ArrowLeft: t - 1, Home: 0, End: tokens.length - 1 }[event.key] ?? t;
          const row = buttons[{ ArrowDown: i + 1, ArrowUp: i - 1 }[event.key] ?? i];
          const next = row?.[Math.min(place, row.length - 1)];
          if (!next || next === button) return;
          event.preventDefault();
          next.focus();
        });
        return button;
      }),
    );
    const colour = () =>
      buttons.forEach((row, i) =>
        row.forEach((button, t) => {
          const credit = at(i, t)[method];
          button.style.setProperty("--strength", `${(55 * Math.min(1, Math.abs(credit) / FULL)).toFixed(0)}%`);
          button.classList.toggle("blamed", credit < 0);
        }),
      );
    const look = (i, t) => {
      const { token, student, teacher, student_top, teacher_top } = completions[i].tokens[t];
      const { sft, rlvr, opd } = at(i, t);
      chosen?.removeAttribute("aria-current");
      chosen?.setAttribute("tabindex", -1);
      chosen = buttons[i][t];
      chosen.setAttribute("aria-current", "true");
      chosen.setAttribute("tabindex", 0);
      tops.replaceChildren(
        bars("the student's top five", student_top, token),
        bars("the teacher's top five", teacher_top, token),
      );
      said.textContent =
        `Token ${t + 1} of completion ${i + 1} is “${written(token)}”. The student gives it ` +
        `${chance(Math.exp(student))}, the teacher ${chance(Math.exp(teacher))}. Its credit is ${signed(opd)} under ` +
        `OPD. It is ${signed(rlvr)} under RLVR, as that of every token of this completion, and ${signed(sft)} under ` +
        "SFT, where this is a text to imitate.";
    };
    const which = choice({
      label: "colour the tokens by their credit under",
      options: [
        { value: "opd", text: "OPD" },
        { value: "rlvr", text: "RLVR" },
        { value: "sft", text: "SFT" },
      ],
      start: method,
      chosen: (value) => {
        method = value;
        colour();
      },
    });
    const rows = completions.map(({ reward }, i) => {
      const label = `completion ${i + 1}: the answer is ${reward ? "right" : "wrong"}`;
      const row = html("div", { class: "explorable-row", role: "group", "aria-label": label }, ...buttons[i]);
      return [html("div", {}, label), row];
    });
    const how =
      "The student wrote all completions. Point at a token, or move with the arrow keys. Blue is credit above zero, " +
      "red below.";
    stage.append(
      html("div", { class: "explorable-controls" }, which),
      html("p", {}, "Prompt ", html("code", {}, prompt), ", right answer ", html("code", {}, answer), `. ${how}`),
      ...rows.flat(),
      tops,
      said,
    );
    colour();
    // Begin with the token that the teacher objects to most.
    const places = completions.flatMap(({ tokens }, i) => tokens.map((_, t) => [i, t]));
    look(...places.reduce((worst, place) => (at(...place).opd < at(...worst).opd ? place : worst)));
  };

  mount("token", draw);
  return { at };
})();
