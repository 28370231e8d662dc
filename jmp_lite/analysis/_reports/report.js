"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const isNumeric = [...body.rows].some((row) => row.cells[column].dataset.v !== undefined);
    if (isNumeric) head.classList.add("n");
    head.firstElementChild.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const sort = before === (isNumeric ? "descending" : "ascending") ? (isNumeric ? "ascending" : "descending") : isNumeric ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sort);
      const sign = sort === "ascending" ? 1 : -1;
      const key = (row) => (isNumeric ? Number(row.cells[column].dataset.v ?? -Infinity) : row.cells[column].textContent);
      const order = (a, b) => (isNumeric ? (a > b) - (a < b) : a.localeCompare(b, "en", { numeric: true }));
      [...body.rows].sort((a, b) => sign * order(key(a), key(b))).forEach((row) => body.append(row));
    });
  });
  const search = table.closest("section").querySelector("input");
  search?.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
