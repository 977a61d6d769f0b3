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

  // What a control was set to is said to those who do not see the chart change.
  function announce(block) {
    const status = document.createElement("p");
    status.setAttribute("aria-live", "polite");
    Object.assign(status.style, {
      position: "absolute", width: "1px", height: "1px", overflow: "hidden", clipPath: "inset(50%)",
    });
    block.appendChild(status);
    const controls = block.querySelector(".explorer-controls");
    controls.addEventListener("change", () => {
      const set = [...controls.querySelectorAll("select, input")].map((control) => {
        const name = control.closest("label") || control.parentElement;
        return name.firstChild.textContent.trim() + " " + control.value;
      });
      status.textContent = "Shown now: " + set.join(", ");
    });
  }

  async function draw(block) {
    const table = block.querySelector(".explorer-table");
    const chart = block.querySelector(".explorer-chart");
    try {
      await runtime();
      const spec = JSON.parse(block.querySelector(".explorer-spec").textContent);
      // width "container" reads the element's width, so it must have one
      chart.style.width = "100%";
      const result = await window.vegaEmbed(chart, spec, {
        renderer: "svg", actions: false,
        ast: true,  // expressions are interpreted: the book's pages compile no text to code
        bind: block.querySelector(".explorer-controls"),
        config: { numberFormat: "~f" },  // a count reads 3, not 3.0
      });
      block.explorerView = result.view;
      announce(block);
      // Vega listens to the window only; a chart drawn in a hidden container must follow that too.
      let width = chart.clientWidth;
      new ResizeObserver(() => {
        if (chart.clientWidth === width) return;
        width = chart.clientWidth;
        window.dispatchEvent(new Event("resize"));
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
