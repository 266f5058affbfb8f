"use strict";
(() => {
  const root = document.documentElement;

  const toggle = document.createElement("button");
  toggle.type = "button";
  toggle.className = "theme";
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { toggle.textContent = dark() ? "Light view" : "Dark view"; };
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  label();
  document.querySelector("header .bar").append(toggle);

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim().toLowerCase();
        const compare = (a, b) => {
          const [x, y] = [key(a), key(b)];
          const [p, q] = [Number(x), Number(y)];
          return Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p < q ? -1 : p > q ? 1 : 0;
        };
        const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -compare(a, b) : compare(a, b)));
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
