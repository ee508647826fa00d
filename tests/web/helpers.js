/* Nodes of a graph, as litegraph makes them, as far as the extension looks at them. */

export function makeNode(type, widgets = {}, more = {}) {
  const node = { type, size: [200, 100], widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })),
    inputs: [], getOutputNodes: () => [], computeSize: () => [200, 120], setSize: (size) => { node.size = size; }, setDirtyCanvas: () => {},
    getInputNode: (slot) => node.inputs[slot].source,
    addDOMWidget: (name, kind, element) => {
      const widget = { name, element };
      node.widgets.push(widget);
      return widget;
    }, ...more };
  return node;
}

export const textOf = (node) => node.widgets.find(({ name }) => name === "result")?.element.textContent;
