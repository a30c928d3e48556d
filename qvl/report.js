"use strict";
(() => {
  const box = document.getElementById("cards");
  const filter = document.getElementById("filter");
  const sort = document.getElementById("sort");
  const count = document.getElementById("count");
  const nothing = document.getElementById("nothing");
  const cards = Array.from(box.children, (element) => ({
    element,
    order: Number(element.dataset.order),
    value: Number(element.dataset.value),
    // The texts only: the word "baseline" stands in every card.
    text: Array.from(element.querySelectorAll("dd, li, .prompt, .name"), (part) => part.textContent)
      .join("\n")
      .toLowerCase(),
  }));
  let visible = cards.map((card) => card.element);

  const comparisons = {
    order: (a, b) => a.order - b.order,
    down: (a, b) => b.value - a.value || a.order - b.order,
    up: (a, b) => a.value - b.value || a.order - b.order,
  };

  // One card only is a tab stop, so that Tab leaves the gallery; j, k and arrows move within it.
  function makeTabStop(element) {
    for (const card of cards) card.element.tabIndex = -1;
    if (element) element.tabIndex = 0;
  }

  function arrange() {
    const focused = document.activeElement;
    box.append(...cards.sort(comparisons[sort.value]).map((card) => card.element));
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) card.element.hidden = !words.every((word) => card.text.includes(word));
    visible = cards.filter((card) => !card.element.hidden).map((card) => card.element);
    nothing.hidden = visible.length > 0;
    count.textContent =
      visible.length === cards.length ? `${cards.length} examples` : `${visible.length} of ${cards.length} examples`;
    makeTabStop(visible[0]);
    if (visible.includes(focused)) focusCard(focused);
  }

  function focusCard(element) {
    makeTabStop(element);
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
  }

  function columns() {
    return getComputedStyle(box).gridTemplateColumns.split(" ").length;
  }

  function move(distance) {
    const at = visible.indexOf(document.activeElement.closest(".card"));
    const target = at < 0 ? visible[0] : visible[Math.min(Math.max(at + distance, 0), visible.length - 1)];
    if (target) focusCard(target);
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isInControl = event.target.matches("input, select");
    if (event.key === "Escape" && event.target === filter) {
      filter.value = "";
      arrange();
      filter.blur();
    } else if (event.key === "Enter" && event.target === filter) {
      if (visible.length) focusCard(visible[0]);
    } else if (isInControl) {
      return;
    } else if (event.key === "/") {
      filter.focus();
      filter.select();
    } else if (event.key === "j") {
      move(1);
    } else if (event.key === "k") {
      move(-1);
    } else if (document.activeElement.matches(".card") && event.key in arrowMoves) {
      // Elsewhere the arrows scroll the page, as everywhere.
      arrowMoves[event.key]();
    } else {
      return;
    }
    event.preventDefault();
  });

  const arrowMoves = {
    ArrowRight: () => move(1),
    ArrowLeft: () => move(-1),
    ArrowDown: () => move(columns()),
    ArrowUp: () => move(-columns()),
    Home: () => move(-visible.length),
    End: () => move(visible.length),
  };

  // A click on a card makes the keys go on from there.
  box.addEventListener("click", (event) => {
    const card = event.target.closest(".card");
    if (card) makeTabStop(card);
  });
  filter.addEventListener("input", arrange);
  sort.addEventListener("change", arrange);
})();
