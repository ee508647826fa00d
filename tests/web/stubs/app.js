/* The page's `app`, as far as extensions use it: it keeps what they register. */
export const app = {
  extensions: [],
  tabs: [],
  graph: null,
  canvas: null,
  registerExtension(extension) { this.extensions.push(extension); },
  toasts: [],
  settings: { "Comfy.Locale": "en" },
  extensionManager: {
    registerSidebarTab: (tab) => app.tabs.push(tab),
    setting: { get: (name) => app.settings[name] },
    toast: { add: (toast) => app.toasts.push(toast) },
  },
};
