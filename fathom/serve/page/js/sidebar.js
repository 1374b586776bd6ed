/** The list of conversations, with renaming, exporting and deleting. */

import { el, icon } from "./dom.js";

export class Sidebar {
  /**
   * @param {object} actions `open(id)`, `rename(id)`, `exportFile(id)`, `remove(id)`
   */
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
    this.panel = document.getElementById("sidebar");
    this.list = document.getElementById("conversations");
    this.toggle = document.getElementById("menu");
    this.backdrop = document.getElementById("backdrop");
    this.toggle.addEventListener("click", () => this.setOpen(!this.panel.classList.contains("open")));
    this.backdrop.addEventListener("click", () => this.setOpen(false));
    this.panel.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.panel.classList.contains("open")) {
        event.stopPropagation();
        this.setOpen(false);
        this.toggle.focus();
      }
    });
  }

  /** On a narrow screen the list is a drawer. */
  setOpen(open) {
    this.panel.classList.toggle("open", open);
    this.backdrop.hidden = !open;
    this.toggle.setAttribute("aria-expanded", String(open));
    if (open) document.getElementById("new").focus();
  }

  show(currentId, running) {
    const focused = document.activeElement?.closest?.("#conversations [data-id]")?.dataset.id;
    const entries = this.store.list();
    this.list.replaceChildren(...entries.map((entry) => this.#row(entry, entry.id === currentId, running.has(entry.id))));
    document.getElementById("none-yet").hidden = entries.length > 0;
    if (focused) this.list.querySelector(`[data-id="${CSS.escape(focused)}"] button`)?.focus();
  }

  #row({ id, title }, current, running) {
    const open = el("button", { type: "button", class: "open-conversation", "aria-current": current ? "true" : null, dir: "auto" });
    open.append(el("span", { class: "title" }, String(title)));
    if (running) open.append(el("span", { class: "running-dot", role: "img", "aria-label": "answering" }));
    open.title = title;
    open.addEventListener("click", () => this.actions.open(id));
    const menu = el("details", { class: "row-menu" });
    const summary = el("summary", { "aria-label": `More for ${title}`, title: "More" }, icon("more"));
    menu.append(summary, el("div", { class: "menu" }, ...this.#menuButtons(id, menu)));
    menu.addEventListener("toggle", () => menu.open && this.#closeOthers(menu));
    menu.addEventListener("focusout", ({ relatedTarget }) => {
      if (relatedTarget && !menu.contains(relatedTarget)) menu.open = false;
    });
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      menu.open = false;
      summary.focus();
    });
    return el("li", { "data-id": id }, open, menu);
  }

  #menuButtons(id, menu) {
    const button = (label, name, act) => {
      const node = el("button", { type: "button" }, icon(name), label);
      node.addEventListener("click", () => {
        menu.open = false;
        act(id);
      });
      return node;
    };
    return [
      button("Rename", "edit", this.actions.rename),
      button("Export as JSON", "export", this.actions.exportFile),
      button("Delete", "delete", this.actions.remove),
    ];
  }

  #closeOthers(menu) {
    for (const other of this.list.querySelectorAll("details[open]")) if (other !== menu) other.open = false;
  }
}

/** Close any open row menu when a click lands elsewhere. */
document.addEventListener("click", ({ target }) => {
  for (const menu of document.querySelectorAll(".row-menu[open]")) if (!menu.contains(target)) menu.open = false;
});

