/* Lets the page show the translations in locales/ where it would keep to the schema's English words: in the tooltips of
   inputs inside a choice, and on sockets that have a label (those of inputs that grow, and the renamed).
   In a language that locales/ does not have, everything is left as it is. */
import { app } from "../../../scripts/app.js";

const LANGUAGES = ["en", "zh"];
const OURS = "DiffSynthBackend_";

const specsOf = (inputs) => Object.entries({ ...inputs?.required, ...inputs?.optional });

/* Without a tooltip of its own, the page looks a widget's tooltip up. */
function forgetTooltips(inputs, nested = false) {
  for (const [, [, options]] of specsOf(inputs)) {
    if (nested && options) delete options.tooltip;
    for (const choice of options?.options ?? []) forgetTooltips(choice.inputs, true);
  }
}

/* Take the labels that inputs were declared with out of a node's definition; gives them by input. */
function takeLabels(inputs) {
  const labels = {};
  for (const [name, [, options]] of specsOf(inputs)) {
    if (!options?.display_name) continue;
    labels[name] = options.display_name;
    delete options.display_name;
  }
  return labels;
}

app.registerExtension({
  name: "DiffSynthBackend.Languages",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const language = app.extensionManager.setting.get("Comfy.Locale");
    if (!nodeData.name.startsWith(OURS) || !LANGUAGES.includes(language)) return;
    forgetTooltips(nodeData.input);
    const labels = takeLabels(nodeData.input);
    const inherited = nodeType.prototype.onInputAdded;
    // A socket without a label shows its translated name; an empty label stays where a missing one would be filled in.
    nodeType.prototype.onInputAdded = function (input) {
      inherited?.apply(this, arguments);
      const declared = labels[input.name] ?? input.name.split(".").pop();
      if (!input.widget && (input.label ?? declared) === declared) input.label = "";  // one given by hand stays
    };
  },
});
