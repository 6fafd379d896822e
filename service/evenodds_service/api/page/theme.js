// The theme before anything is drawn: a module would come after the first light frame of a dark page.

const systemDark = matchMedia("(prefers-color-scheme: dark)");

/** The system's, until the button says otherwise. Returns whether it is the dark one. */
function applyTheme() {
  const chosen = kept("localStorage", "evenodds-theme");
  const isDark = chosen ? chosen === "dark" : systemDark.matches;
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  return isDark;
}
applyTheme();
