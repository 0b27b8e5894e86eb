(() => {
  "use strict";
  function sort(table, head) {
    const column = [...head.parentElement.children].indexOf(head);
    const descending = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const isNumber = head.classList.contains("number");
    const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent.trim();
    const rows = [...table.tBodies[0].rows].map((row) => [row, key(row)]);
    rows.sort(([, one], [, other]) => {
      if (isNumber && (one === "" || other === "")) return (one === "") - (other === ""); // what is undefined comes last
      const order = isNumber ? one - other : one.localeCompare(other, "en", { numeric: true });
      return descending ? -order : order;
    });
    table.tBodies[0].append(...rows.map(([row]) => row));
  }

  function filter(section) {
    const words = section.querySelector("input[type=search]").value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...section.querySelector("tbody").rows];
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    section.querySelector("output").textContent = `${shown} of ${rows.length} rows`;
  }

  document.querySelectorAll("section.table").forEach((section) => {
    const table = section.querySelector("table");
    if (!table) return;
    section.querySelector("input[type=search]").addEventListener("input", () => filter(section));
    table.querySelectorAll("thead th").forEach((head) =>
      head.querySelector("button").addEventListener("click", () => sort(table, head)));
    filter(section);
  });
})();
