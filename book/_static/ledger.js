// Adds the filters of the claims ledger. Without JavaScript every chapter can be opened by hand.
(() => {
  const FEW = 12; // so many claims are shown at once when a filter leaves no more
  const OWNERS = { paper: "the paper", code: "the published code", ours: "our own question" };
  const ORDER = ["holds", "direction only", "open", "not testable here",
                 "no difference that matters", "refuted here", "mixed", "unstable"];

  function start(ledger) {
    const chapters = [...ledger.querySelectorAll(".ledger-chapter")].map((box) => ({
      box,
      number: box.querySelector(".ledger-number"),
      words: box.querySelector(".ledger-number").textContent,
      tables: [...box.querySelectorAll(".table-scroll")],
      rows: [...box.querySelectorAll("tbody tr")],
    }));
    for (const { box, rows } of chapters)
      for (const row of rows) row.dataset.part = box.dataset.part;
    const rows = chapters.flatMap((chapter) => chapter.rows);
    const place = ledger.querySelector(".ledger-filters");
    const filters = [];

    function addFilter(key, name, words = {}, order = []) {
      const values = [...new Set(rows.map((row) => row.dataset[key]))];
      const rank = (value) => (order.includes(value) ? order.indexOf(value) : order.length);
      values.sort((a, b) => rank(a) - rank(b));
      const label = document.createElement("label");
      const select = document.createElement("select");
      select.name = key;
      select.setAttribute("aria-label", name);
      select.append(new Option("all", ""));
      for (const value of values) select.append(new Option(words[value] || value, value));
      select.addEventListener("change", () => apply(true));
      label.append(name + " ", select);
      place.append(label);
      filters.push(select);
    }

    function addButton(text, open) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => {
        for (const { box } of chapters) if (!box.hidden) box.open = open;
      });
      place.append(button);
    }

    const shown = document.createElement("output");

    function apply(changed) {
      const active = filters.some((filter) => filter.value);
      let count = 0, kept = 0;
      for (const chapter of chapters) {
        let own = 0;
        for (const row of chapter.rows) {
          row.hidden = filters.some((f) => f.value && row.dataset[f.name] !== f.value);
          own += !row.hidden;
        }
        for (const table of chapter.tables)
          table.hidden = !table.querySelector("tbody tr:not([hidden])");
        chapter.box.hidden = active && !own;
        chapter.number.textContent = active
          ? own + " of " + chapter.words + " shown" : chapter.words;
        count += own;
        kept += !chapter.box.hidden;
      }
      for (const part of ledger.querySelectorAll(".ledger-part"))
        part.hidden = !part.querySelector(".ledger-chapter:not([hidden])");
      if (changed)
        for (const { box } of chapters) box.open = active && count <= FEW && !box.hidden;
      shown.textContent = count + " of " + rows.length + " claims, in " + kept +
        (kept === 1 ? " chapter" : " chapters");
    }

    const parts = [...ledger.querySelectorAll(".ledger-part")];
    addFilter("part", "Part", Object.fromEntries(
      parts.map((part) => [part.dataset.part, part.querySelector("h2").textContent])));
    addFilter("whose", "Whose", OWNERS, Object.keys(OWNERS));
    addFilter("verdict", "Verdict", {}, ORDER);
    addFilter("scale", "Scale", {}, ["ci", "cpu", "gpu"]);
    addButton("Open all", true);
    addButton("Close all", false);
    place.append(shown);
    apply(false);
  }

  for (const ledger of document.querySelectorAll(".ledger")) start(ledger);
})();
