// Adds the filters of the claims ledger. Without JavaScript the whole table is there.
(() => {
  function choices(rows, key) {
    return [...new Set(rows.map((row) => row.dataset[key]))];
  }

  function addFilter(place, rows, key, name, apply) {
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.name = key;
    select.append(new Option("all", ""));
    for (const value of choices(rows, key)) select.append(new Option(value, value));
    select.addEventListener("change", apply);
    label.append(name + " ", select);
    place.append(label);
    return select;
  }

  for (const ledger of document.querySelectorAll(".ledger")) {
    const rows = [...ledger.querySelectorAll("tbody tr")];
    const place = ledger.querySelector(".ledger-filters");
    const shown = document.createElement("output");
    const apply = () => {
      let count = 0;
      for (const row of rows) {
        row.hidden = filters.some((f) => f.value && row.dataset[f.name] !== f.value);
        count += !row.hidden;
      }
      shown.textContent = count + " of " + rows.length + " shown";
    };
    const filters = [
      addFilter(place, rows, "verdict", "Verdict", apply),
      addFilter(place, rows, "scale", "Scale", apply),
    ];
    place.append(shown);
    apply();
  }
})();
