/* The page's `app`, as far as extensions use it: it keeps what they register. */
export const app = {
  extensions: [],
  tabs: [],
  graph: null,
  canvas: null,
  setLanguage(locale) {
    app.settings["Comfy.Locale"] = locale;
    app.ui.settings.dispatchEvent(new Event("Comfy.Locale.change"));
    return new Promise((resolve) => { setTimeout(resolve, 0); });
  },
  registerExtension(extension) { this.extensions.push(extension); },
  toasts: [],
  ui: { settings: new EventTarget() },
  settings: { "Comfy.Locale": "en" },
  extensionManager: {
    registerSidebarTab: (tab) => app.tabs.push(tab),
    setting: { get: (name) => app.settings[name] },
    toast: { add: (toast) => app.toasts.push(toast),
      remove: (toast) => { app.toasts = app.toasts.filter((other) => other !== toast); } },
  },
};
