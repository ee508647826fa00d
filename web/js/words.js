/* Every word that the pack's scripts show, in the languages of locales/. A phrase with gaps is a function of the texts
   that fill them: numbers arrive as texts, so that a phrase is nothing but words. */
import { app } from "../../../scripts/app.js";

const en = {
  // places and parts of memory
  vram: "VRAM", staged: "staged", ram: "RAM", disk: "disk", stays: "stays", computation: "computation",

  // the sidebar
  memory: "Memory", memoryTitle: "DiffSynth memory", memoryTooltip: "Memory map (DiffSynth)",
  free: "Free everything",
  freeTooltip: "Unload all models and forget earlier results, at the next moment when nothing runs",
  nothingLoaded: "No model is loaded.",
  pipeline: (family, dtype, device, limit) => `${family} · ${dtype} on ${device} · ${limit}`,
  noLimit: "no limit", limitZero: "limit 0: nothing stays", limit: (size) => `limit ${size}`,
  withLoras: (parts, size) => `${parts} (LoRAs ${size})`,
  lastPlan: "Plan of the last loop",
  ofLimit: (parts, size) => `${parts} of the limit, ${size}`, ofDevice: (parts, size) => `${parts} of ${size}`,
  inUse: (size) => `${size} in use now`,
  perStep: (moved) => `${moved} cross per step`, fromDisk: (moved) => `${moved} cross per step from disk`,
  partFromDisk: (moved, read) => `${moved} cross per step, ${read} of that from disk`,
  aboutSeconds: (what, seconds) => `${what}, about ${seconds} s`,
  traffic: (moved, passes, speed, waited) => `Moved ${moved} in ${passes} passes at ${speed}/s, waited ${waited} s`,
  peak: (size) => `at most ${size} of weights on the device`,

  // the estimate below VRAM Config
  weights: (size, dtype, where) => `${size} of weights in ${dtype}, ${where}`,
  onDevice: (device) => `on ${device}`, onDisk: "on disk", restsOn: (place) => `rests on ${place}`,
  worksFrom: (rests, place) => `${rests}, works from ${place}`,
  auto: (preset, reason) => `auto: ${preset}, because ${reason}`,
  fit: "fit", fitNot: "do not fit",
  weightsAndCard: (weights, fit, card, computation) =>
    `${weights} of weights ${fit} the card's ${card} beside ${computation} for the computation`,
  weightsAndRam: (weights, fit, ram) => `${weights} of weights ${fit} ${ram}`,
  freeRam: (size, reserved) => `${size} of free RAM (${reserved} are left to the system)`,
  andRam: (card, fit, ram) => `${card}; they ${fit} ${ram}`,
  givenLimit: (limit, reason) => `vram_limit is ${limit} GiB, and ${reason}`,
  limitOf: (limit, device) => `limit: ${limit} GiB of ${device}`,
  ramLimit: (limit) => `the ram_limit of ${limit} GiB`,
  waitInRam: (limit) => `RAM: ${limit} GiB for layers that would be read from disk in each step`,
  planAt: (model, size) => `${model} at ${size}`,
  plan: (model, stay, ram, disk, moved, seconds) => `${model}: ${stay} stay on the device, ${ram} wait in RAM, `
    + `${disk} on disk; ${moved} cross per step, ${seconds} s expected`,
  movedOnce: (moved, once) => `${moved} after ${once} once`,
  forComputation: (plan, size) => `${plan}; about ${size} for the computation`,
  tooLow: (size, limit, floor) => `${size} does not fit: the limit is ${limit} GiB, and the least that would do is `
    + `${floor} GiB. Raise it, or draw a smaller picture or fewer frames.`,
  problems: {
    missing: "Some of the model's files are missing: run the Model Loader to see which.",
    unreadable: "These files cannot be estimated: run the Model Loader to see why.",
    no_model: "No model: connect Model Configs to the Model Loader.",
    nothing_moves: (presets) => `With this preset every model stays where it is as a whole: choose one whose layers `
      + `move (${presets}), or no limit.`,
    nothing_read: "With this preset no layer is read from disk while its model is in use, so there is nothing to keep in "
      + "RAM: choose disk or auto, or no ram_limit.",
  },

  // while something is loaded
  loading: (title, number, count) => `loading ${title} (${number} of ${count})`,
  shard: (number, count) => `shard ${number}/${count}`,
  of: (done, total) => `${done} of ${total}`,
  vramOf: (used, room) => `VRAM ${used} of ${room}`,
  stopped: "stopped",

  // files of known models
  about: (size) => `about ${size}`, licenceAt: (address) => `see ${address}`,
  missing: (names) => `missing: ${names}`, complete: "complete",
  download: "Download", downloadTitle: "Download models?",
  question: (name, files, licences) => `${name}: download ${files} from a model hub? Licence: ${licences}.`,
  off: "Downloads are off. Switch them on in Settings, DiffSynth, Downloads.",
  byHand: (repositories) => `Or by hand: ${repositories} from huggingface.co or modelscope.cn, each into `
    + "models/diffsynth/<owner>/<name>.",
  queued: "waiting for its turn", refused: (reason) => `The server refused: ${reason}`,
  asking: "asking the hub", perSecond: (size) => `${size}/s`, left: (time) => `${time} left`,
  hours: (hours, minutes) => `${hours} h ${minutes} min`, minutes: (minutes) => `${minutes} min`,
  seconds: (seconds) => `${seconds} s`,
  modelsMissing: "This workflow's models are not all here",
  pressDownload: (nodes) => `${nodes}. The button Download below the node brings them.`,
  missingAt: (node, model) => `${node}: ${model}`,
};

const zh = {
  vram: "显存", staged: "中转", ram: "内存", disk: "硬盘", stays: "常驻", computation: "计算",

  memory: "内存图", memoryTitle: "DiffSynth 内存图", memoryTooltip: "内存图（DiffSynth）",
  free: "全部释放",
  freeTooltip: "在没有任务运行的下一刻，卸载所有模型并清除之前的结果",
  nothingLoaded: "没有已加载的模型。",
  pipeline: (family, dtype, device, limit) => `${family} · ${device} 上以 ${dtype} 计算 · ${limit}`,
  noLimit: "没有上限", limitZero: "上限 0：没有常驻的层", limit: (size) => `上限 ${size}`,
  withLoras: (parts, size) => `${parts}（其中 LoRA ${size}）`,
  lastPlan: "上一次循环的计划",
  ofLimit: (parts, size) => `${parts}，上限 ${size}`, ofDevice: (parts, size) => `${parts}，共 ${size}`,
  inUse: (size) => `当前占用 ${size}`,
  perStep: (moved) => `每步传输 ${moved}`, fromDisk: (moved) => `每步从硬盘传输 ${moved}`,
  partFromDisk: (moved, read) => `每步传输 ${moved}，其中 ${read} 来自硬盘`,
  aboutSeconds: (what, seconds) => `${what}，约 ${seconds} 秒`,
  traffic: (moved, passes, speed, waited) => `${passes} 遍共传输 ${moved}，速度 ${speed}/秒，等待 ${waited} 秒`,
  peak: (size) => `显卡上的权重最多 ${size}`,

  weights: (size, dtype, where) => `权重 ${size}（${dtype}），${where}`,
  onDevice: (device) => `在 ${device} 上`, onDisk: "在硬盘上", restsOn: (place) => `存放在 ${place}`,
  worksFrom: (rests, place) => `${rests}，工作时在 ${place}`,
  auto: (preset, reason) => `auto：选择 ${preset}，因为${reason}`,
  fit: "放得下", fitNot: "放不下",
  weightsAndCard: (weights, fit, card, computation) =>
    `显存 ${card} 除去计算所需的 ${computation}，${fit} ${weights} 的权重`,
  weightsAndRam: (weights, fit, ram) => `${ram}${fit} ${weights} 的权重`,
  freeRam: (size, reserved) => `空闲内存 ${size}（其中 ${reserved} 留给系统）`,
  andRam: (card, fit, ram) => `${card}；${ram}${fit}`,
  givenLimit: (limit, reason) => `给定的上限为 ${limit} GiB，并且${reason}`,
  limitOf: (limit, device) => `上限：${limit} GiB（${device}）`,
  ramLimit: (limit) => `内存上限 ${limit} GiB `,
  waitInRam: (limit) => `内存：${limit} GiB 用于存放否则每步都要从硬盘读取的层`,
  planAt: (model, size) => `${model}（${size}）`,
  plan: (model, stay, ram, disk, moved, seconds) => `${model}：${stay} 常驻显卡，${ram} 在内存中等待，${disk} 在硬盘上；`
    + `每步传输 ${moved}，预计 ${seconds} 秒`,
  movedOnce: (moved, once) => `${moved}（之前一次性传输 ${once}）`,
  forComputation: (plan, size) => `${plan}；计算约需 ${size}`,
  tooLow: (size, limit, floor) => `${size} 放不下：上限为 ${limit} GiB，至少需要 ${floor} GiB。`
    + "请提高上限，或者缩小画面、减少帧数。",
  problems: {
    missing: "模型缺少一些文件：运行“模型加载器”可以看到缺少哪些。",
    unreadable: "无法估算这些文件：运行“模型加载器”可以看到原因。",
    no_model: "没有模型：请把“模型配置”连接到“模型加载器”。",
    nothing_moves: (presets) => `在这个预设下每个模型都整体留在原处：请选择各层会移动的预设（${presets}），或者不设上限。`,
    nothing_read: "在这个预设下模型工作时不从硬盘读取任何层，没有可以留在内存中的：请选择 disk 或 auto，或者不设内存上限。",
  },

  loading: (title, number, count) => `正在加载 ${title}（${number}/${count}）`,
  shard: (number, count) => `分片 ${number}/${count}`,
  of: (done, total) => `${done} / ${total}`,
  vramOf: (used, room) => `显存 ${used} / ${room}`,
  stopped: "已停止",

  about: (size) => `约 ${size}`, licenceAt: (address) => `见 ${address}`,
  missing: (names) => `缺少：${names}`, complete: "完整",
  download: "下载", downloadTitle: "下载模型？",
  question: (name, files, licences) => `${name}：从模型站下载 ${files}？许可证：${licences}。`,
  off: "下载已关闭。请在“设置 → DiffSynth → 下载”中打开。",
  byHand: (repositories) => `或者手动下载：从 huggingface.co 或 modelscope.cn 获取 ${repositories}，`
    + "分别放入 models/diffsynth/<owner>/<name>。",
  queued: "排队中", refused: (reason) => `服务器拒绝：${reason}`,
  asking: "正在询问模型站", perSecond: (size) => `${size}/秒`, left: (time) => `还需 ${time}`,
  hours: (hours, minutes) => `${hours} 小时 ${minutes} 分`, minutes: (minutes) => `${minutes} 分`,
  seconds: (seconds) => `${seconds} 秒`,
  modelsMissing: "这个工作流的模型不完整",
  pressDownload: (nodes) => `${nodes}。节点下方的“下载”按钮可以补齐。`,
  missingAt: (node, model) => `${node}：${model}`,
};

const WORDS = { en, zh };

/* The words of a language, "zh-TW" as "zh"; English for one that is not here. */
export const words = (locale) => WORDS[String(locale).split("-")[0]] ?? en;

/* The words of the page's language, as it is set at this moment. */
export const say = () => words(app.extensionManager.setting.get("Comfy.Locale"));

/* Have something said anew when the page's language changes; it has the new one right after the event. */
export const whenLanguageChanges = (then) => {
  app.ui.settings.addEventListener("Comfy.Locale.change", () => setTimeout(then));
};
