/** Making elements, icons and copies. Nothing here, or anywhere in this page, parses a string as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (`true` writes an empty one; `null`, `undefined` and `false` none) and children. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** One of the symbols in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon that says in words what it does, to the eye on hovering and to a screen reader. */
export function iconButton(name, label, onClick) {
  const button = el("button", { type: "button", class: "icon-button", "aria-label": label, title: label }, icon(name));
  button.addEventListener("click", onClick);
  return button;
}

/** Put `text` on the clipboard and show on `button` that it worked. */
export async function copy(text, button) {
  const done = await toClipboard(text);
  announce(done ? "Copied" : "The browser did not allow copying");
  const use = button.querySelector("use");
  use.setAttribute("href", done ? "#icon-check" : "#icon-close");
  setTimeout(() => use.setAttribute("href", "#icon-copy"), 1500);
}

async function toClipboard(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  // Over plain HTTP from another machine there is no clipboard object, only the old command.
  const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** Tell a screen reader, politely. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** Show a note above the composer until it is dismissed or replaced; `action` is `[label, function]`. */
export function notify(text, action) {
  const box = document.getElementById("notice");
  box.replaceChildren(el("span", {}, text));
  if (action) {
    const button = el("button", { type: "button", class: "text-button" }, action[0]);
    button.addEventListener("click", () => {
      dismissNotice();
      action[1]();
    });
    box.append(button);
  }
  box.append(iconButton("close", "Dismiss", dismissNotice));
  box.hidden = false;
}

export function dismissNotice() {
  const box = document.getElementById("notice");
  box.hidden = true;
  box.replaceChildren();
}

/** Make what scrolls sideways reachable by keyboard, and only that. */
const reachable = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

export function scrollsSideways(node, label) {
  node.classList.add("scrolls");
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", label);
  reachable.observe(node);
  return node;
}
