"use strict";
// Shows one trajectory at a time. Without it the page shows them all.
(() => {
  const section = document.getElementById("episodes");
  if (!section) return;
  const find = (selector) => section.querySelector(selector);
  const all = [...section.querySelectorAll("article")];
  const [filters, map, pager, counter, nothing] = [".filters", ".map", ".pager", "output", ".nothing"].map(find);
  const texts = new Map(); // lower-cased text of each trajectory, read when the first search needs it
  let matching = all;
  let current = all[0];

  const textOf = (article) => {
    if (!texts.has(article)) texts.set(article, article.textContent.toLowerCase());
    return texts.get(article);
  };

  const matches = (article) => {
    const { row, outcome, kind, text } = filters.elements;
    return (
      (!row.value || article.dataset.row === row.value) &&
      (!outcome.value || article.dataset.outcome === outcome.value) &&
      (!kind.value || article.dataset.kind === kind.value) &&
      (!text.value.trim() || textOf(article).includes(text.value.trim().toLowerCase()))
    );
  };

  const dots = new Map(
    all.map((article) => {
      const dot = document.createElement("button");
      dot.type = "button";
      dot.tabIndex = -1; // the keyboard has previous and next
      dot.className = article.dataset.outcome;
      dot.title = `${article.dataset.row}, ${article.dataset.outcome}: ${article.querySelector("h3").textContent}`;
      dot.setAttribute("aria-label", dot.title);
      dot.addEventListener("click", () => show(article));
      map.append(dot);
      return [article, dot];
    }),
  );

  const show = (article) => {
    current = article;
    for (const other of all) {
      other.hidden = other !== article;
      dots.get(other).hidden = !matching.includes(other);
      dots.get(other).classList.toggle("now", other === article);
    }
    const correct = matching.filter((other) => other.dataset.outcome === "correct").length;
    const at = matching.indexOf(article) + 1;
    counter.textContent = matching.length ? `${at} of ${matching.length} · ${correct} correct` : "none";
    nothing.hidden = matching.length > 0;
  };

  const filter = () => {
    matching = all.filter(matches);
    show(matching.includes(current) ? current : matching[0]);
  };

  const move = (by) => {
    if (!matching.length) return;
    const at = matching.indexOf(current) + by;
    show(matching[(at + matching.length) % matching.length]);
    if (current.getBoundingClientRect().top < 0) current.scrollIntoView();
  };

  // a link to a trajectory shows it, also where the filters would hide it
  const follow = () => {
    const article = all.find((one) => `#${one.id}` === location.hash);
    if (!article) return;
    if (!matching.includes(article)) {
      filters.reset();
      matching = all;
    }
    show(article);
    article.scrollIntoView();
  };

  filters.addEventListener("input", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  find(".back").addEventListener("click", () => move(-1));
  find(".next").addEventListener("click", () => move(1));
  section.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, pre") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  window.addEventListener("hashchange", follow);
  for (const part of [filters, map, pager]) part.hidden = false;
  filter();
  follow();
})();
