/* The words in both languages: the same ones, and written as each language writes them. */
import { expect, test } from "vitest";
import { words } from "../../web/js/words.js";

/* Every phrase by its path, with its gaps filled. */
function phrases(table, path = "") {
  return Object.entries(table).flatMap(([name, word]) => typeof word === "object" ? phrases(word, `${path}${name}.`)
    : [[path + name, typeof word === "function" ? word(...Array.from({ length: word.length }, (_, i) => `X${i}`)) : word]]);
}

const gaps = (text) => [...text.matchAll(/X\d/g)].map(([gap]) => gap).sort();
const [en, zh] = ["en", "zh"].map((language) => phrases(words(language)));

test("each phrase is there in both languages, with the same gaps", () => {
  // What English says with a verb for many may be in the noun's place elsewhere, but nothing may be left out.
  expect(zh.map(([name, text]) => [name, gaps(text)])).toEqual(en.map(([name, text]) => [name, gaps(text)]));
  expect(en.length).toBeGreaterThan(60);
});

test("Chinese has its own punctuation, and English none of it", () => {
  expect(zh.filter(([, text]) => /[\u4e00-\u9fff] ?[,:;!?()]|[,:;!?()] ?[\u4e00-\u9fff]/.test(text))).toEqual([]);
  expect(en.filter(([, text]) => /[\u3000-\u9fff\uff00-\uffef]/.test(text))).toEqual([]);
});

test("languages of regions are their language, and others English", () => {
  expect([words("zh-TW"), words("zh-CN")]).toEqual([words("zh"), words("zh")]);
  for (const other of ["fr", undefined]) expect(words(other)).toBe(words("en"));
});
