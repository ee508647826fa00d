/* Shows the result of a node below its inputs: what the Model Loader recognised and plans, which models a LoRA fits,
   where a new one was saved, what Denoise has moved.
   The text is set as text, never as markup: names of files come from anywhere. */
import { app } from "../../../scripts/app.js";

/* The nodes, and whether their text is about one run only: that goes when the next one begins. */
const NODES = { DiffSynthBackend_ModelLoader: false, DiffSynthBackend_LoraLoader: false,
  DiffSynthBackend_LoraStack: false, DiffSynthBackend_ApplyLora: false, DiffSynthBackend_ImageToLora: false,
  DiffSynthBackend_Denoise: true };
const WIDGET = "result";
const LINE_HEIGHT = 15;
const LETTER_WIDTH = 5.5;  // about, in pixels
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

function showText(node, text) {
  const widget = widgetOf(node) ?? makeWidget(node);
  widget.element.textContent = text;
  const rows = text.split("\n").map((line) => Math.ceil(line.length * LETTER_WIDTH / (node.size[0] - 40)));
  const wanted = node.computeSize()[1] - 60 + (rows.reduce((sum, count) => sum + count, 0) + 2) * LINE_HEIGHT;
  node.setSize([node.size[0], Math.max(node.size[1], wanted)]);
}

/* Let a function run whenever a method of a class of nodes is called, after what is there already. */
function follow(nodeType, method, then) {
  const inherited = nodeType.prototype[method];
  nodeType.prototype[method] = function () {
    const result = inherited?.apply(this, arguments);
    then(this, ...arguments);
    return result;
  };
}

app.registerExtension({
  name: "DiffSynthBackend.LoaderText",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!(nodeData.name in NODES)) return;
    follow(nodeType, "onExecuted", (node, output) => {
      if (output?.text) showText(node, [output.text].flat().join("\n"));
    });
    if (NODES[nodeData.name]) follow(nodeType, "onExecutionStart", (node) => {
      if (widgetOf(node)) widgetOf(node).element.textContent = "";
    });
  },
});
