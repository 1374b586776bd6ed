/** Light, dark, or as the system says: one button goes round. `theme.js` applies the choice at the next start. */

import { announce } from "./dom.js";

const NEXT = { system: "light", light: "dark", dark: "system" };
const KEY = "fathom.theme";

export function setUpTheme(button) {
  const show = () => {
    const theme = document.documentElement.dataset.theme ?? "system";
    const label = `Theme: ${theme}. Switch to ${NEXT[theme]}`;
    button.setAttribute("aria-label", label);
    button.title = label;
    button.querySelector("use").setAttribute("href", `#icon-${theme}`);
    return theme;
  };
  button.addEventListener("click", () => {
    const theme = NEXT[show()];
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // it lasts for this visit then
    }
    announce(`Theme: ${show()}`);
  });
  show();
}
