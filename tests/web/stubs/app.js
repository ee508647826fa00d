/* The page's `app`, as far as extensions use it: it keeps what they register. */
export const app = {
  extensions: [],
  tabs: [],
  graph: null,
  canvas: null,
  registerExtension(extension) { this.extensions.push(extension); },
  extensionManager: { registerSidebarTab: (tab) => app.tabs.push(tab) },
};
