// Sets the colours before anything is drawn, so that nothing flashes. A plain script: modules run too late for that.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem('cohort-theme');
  } catch {
    // Storage may be forbidden; the system's colours are right then.
  }
  if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme;
})();
