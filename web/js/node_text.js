/* A text below a node's inputs. It is set as text, never as markup: names of files come from anywhere. */

const WIDGET = "result";
const LINE_HEIGHT = 15;
const LETTER_WIDTH = 5.5;  // about, in pixels; Chinese characters and their punctuation are twice as wide
const WIDE = /[\u2e80-\uffef]/g;
const STYLE = { margin: "0", padding: "4px 6px", font: `11px/${LINE_HEIGHT}px sans-serif`, whiteSpace: "pre-wrap",
  overflow: "auto", overflowWrap: "anywhere", boxSizing: "border-box", color: "var(--input-text)",
  background: "var(--comfy-input-bg)",
  borderRadius: "4px", userSelect: "text" };

function makeWidget(node) {
  const element = Object.assign(document.createElement("pre"), { className: "diffsynth-result" });
  Object.assign(element.style, STYLE);
  const widget = node.addDOMWidget(WIDGET, "diffsynth_text", element, { serialize: false, getMinHeight: () => 60 });
  widget.serialize = false;
  return widget;
}

const widgetOf = (node) => node.widgets?.find((candidate) => candidate.name === WIDGET);

/* What stands there; undefined if nothing was ever said. */
export const textOf = (node) => widgetOf(node)?.element.textContent;

export function showText(node, text) {
  const widget = widgetOf(node) ?? makeWidget(node);
  if (widget.element.textContent === text) return;
  widget.element.textContent = text;
  const letters = (line) => line.length + (line.match(WIDE)?.length ?? 0);
  const rows = text.split("\n").map((line) => Math.ceil(letters(line) * LETTER_WIDTH / (node.size[0] - 40)));
  const wanted = node.computeSize()[1] - 60 + (rows.reduce((sum, count) => sum + count, 0) + 2) * LINE_HEIGHT;
  node.setSize([node.size[0], Math.max(node.size[1], wanted)]);
}

/* Empty the text, if there is one. */
export function clearText(node) {
  if (widgetOf(node)) widgetOf(node).element.textContent = "";
}

/* Let a function run whenever a method of a class of nodes is called, after what is there already. */
export function follow(nodeType, method, then) {
  const inherited = nodeType.prototype[method];
  nodeType.prototype[method] = function () {
    const result = inherited?.apply(this, arguments);
    then(this, ...arguments);
    return result;
  };
}

/* The node that an event of the server is about: of one in a subgraph, the path of ids leads there. */
export function nodeOf(graph, path) {
  let node = null;
  for (const id of String(path).split(":")) {
    node = graph?.getNodeById(id) ?? graph?.getNodeById(Number(id)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}
