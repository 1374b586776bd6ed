/** Runs before the page is drawn, so that a chosen theme does not flash in. Without a choice the system's counts. */
(() => {
  try {
    const theme = localStorage.getItem("fathom.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // storage is switched off: the system's theme it is
  }
})();
