// Draws every static explorer of a page. In the book the runtime lies beside this script; a live
// notebook brings it along. If anything fails, the table stays open and the block says so.
(() => {
  const here = document.currentScript && document.currentScript.src;

  function load(address) {
    return new Promise((resolve, reject) => {
      const tag = document.createElement("script");
      tag.src = address;
      tag.onload = resolve;
      tag.onerror = () => reject(new Error("could not load " + address));
      document.head.appendChild(tag);
    });
  }

  // One load for the page, however many explorers it has.
  function runtime() {
    if (window.vegaEmbed) return Promise.resolve();
    if (!window.explorerLoading) {
      const beside = here ? [new URL("vega-runtime.js", here).href] : [];
      const addresses = window.explorerRuntime || beside;
      window.explorerLoading = addresses.reduce(
        (before, address) => before.then(() => load(address)), Promise.resolve());
    }
    return window.explorerLoading;
  }

  // What a move of a control shows, in words, for who does not see the chart.
  function say(block, view, spec) {
    const number = (value) => Number(value.toPrecision(3)).toString();
    const chosen = spec.params.map((param) => view.signal(param.name));
    const rows = spec.data.values.filter((row) => chosen.every((value, i) =>
      typeof value === "number" ? Math.abs(row["c" + i] - value) < 1e-6 * (Math.abs(value) + 1)
        : row["c" + i] === value));
    const lines = new Map();
    for (const row of rows) {
      const name = [row.panel, row.series].filter((part) => part !== undefined).join(", ");
      lines.set(name, [...(lines.get(name) || []), row]);
    }
    const told = (own) => {
      const [low, high] = [Math.min, Math.max].map((end) => number(end(...own.map((row) => row.y))));
      if (own.length === 1 && typeof own[0].x === "number") return low + " at " + number(own[0].x);
      return low === high ? low : "from " + low + " to " + high;
    };
    const words = [...lines].map(([name, own]) => (name && name + " ") + told(own));
    block.querySelector(".explorer-said").textContent =
      spec.params.map((param, i) => param.bind.name + " " + chosen[i]).join(", ") + ": " +
      words.join("; ");
  }

  // Axes side by side have no width of their own: they share that of the block.
  function spread(chart, view, spec) {
    const panels = new Set(spec.data.values.map((row) => row.panel)).size;
    const around = chart.querySelector("svg").getAttribute("width") -
      panels * view.signal("child_width");
    const each = Math.max(40, Math.floor((chart.clientWidth - around - 4) / panels));
    return view.signal("child_width", each).resize().runAsync();
  }

  // A phone has no room for two columns of long names; letters are about 7 pixels wide.
  function roomy(spec) {
    const names = [...new Set(spec.data.values.map((row) => row.series ?? ""))];
    const widest = (side) => Math.max(0, ...names.filter((_, i) => i % 2 === side).map((n) => n.length));
    const needed = 7.2 * (widest(0) + widest(1)) + 90;
    // reading the width makes the chart ask again when the window changes
    const room = "0 * width + containerSize()[0]";
    if (!spec.facet) spec.config.legend.columns = { expr: `${room} < ${needed} ? 1 : 2` };
    spec.config.axis.labelSeparation = 5;
  }

  async function draw(block) {
    const table = block.querySelector(".explorer-table");
    const chart = block.querySelector(".explorer-chart");
    try {
      await runtime();
      const spec = JSON.parse(block.querySelector(".explorer-spec").textContent);
      // width "container" reads the element's width, so it must have one
      chart.style.width = "100%";
      roomy(spec);
      const result = await window.vegaEmbed(chart, spec, {
        renderer: "svg", actions: false,
        ast: true,  // expressions are interpreted: the book's pages compile no text to code
        bind: block.querySelector(".explorer-controls"),
        config: { numberFormat: "~f" },  // a count reads 3, not 3.0
      });
      block.explorerView = result.view;
      if (spec.facet) await spread(chart, result.view, spec);
      for (const param of spec.params || [])
        result.view.addSignalListener(param.name, () => say(block, result.view, spec));
      // Vega listens to the window only; a chart drawn in a hidden container must follow that too.
      let width = chart.clientWidth;
      new ResizeObserver(() => {
        if (chart.clientWidth === width) return;
        width = chart.clientWidth;
        if (spec.facet) spread(chart, result.view, spec);
        else window.dispatchEvent(new Event("resize"));
      }).observe(chart);
      table.open = false;
      block.dataset.state = "drawn";
    } catch (error) {
      table.open = true;
      chart.textContent = "The chart could not be drawn here (" + error.message +
        "). The table below holds the same numbers.";
      block.dataset.state = "failed";
    }
  }

  function all() {
    for (const block of document.querySelectorAll(".explorer:not([data-state])")) {
      block.dataset.state = "drawing";
      draw(block);
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
