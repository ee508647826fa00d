/* Shows the Model Loader's result below its inputs: what was recognised, how large it is, where it lives.
   The text is set as text, never as markup: names of files come from anywhere. */
import { app } from "../../../scripts/app.js";

const LOADER = "DiffSynthBackend_ModelLoader";
const WIDGET = "result";
const LINE_HEIGHT = 15;
const STYLE = { margin: "0", padding: "4px 6px", font: `11px/${LINE_HEIGHT}px sans-serif`, whiteSpace: "pre-wrap",
  overflow: "auto", boxSizing: "border-box", color: "var(--input-text)", background: "var(--comfy-input-bg)",
  borderRadius: "4px", userSelect: "text" };

function makeWidget(node) {
  const element = Object.assign(document.createElement("pre"), { className: "diffsynth-result" });
  Object.assign(element.style, STYLE);
  const widget = node.addDOMWidget(WIDGET, "diffsynth_text", element, { serialize: false, getMinHeight: () => 60 });
  widget.serialize = false;
  return widget;
}

function showText(node, text) {
  const widget = node.widgets?.find((candidate) => candidate.name === WIDGET) ?? makeWidget(node);
  widget.element.textContent = text;
  const wanted = node.computeSize()[1] - 60 + (text.split("\n").length * 2 + 1) * LINE_HEIGHT;
  node.setSize([node.size[0], Math.max(node.size[1], wanted)]);
}

app.registerExtension({
  name: "DiffSynthBackend.LoaderText",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== LOADER) return;
    const inherited = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      inherited?.apply(this, arguments);
      if (output?.text) showText(this, [output.text].flat().join("\n"));
    };
  },
});
