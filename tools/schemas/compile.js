// A schema as JSON on standard input, compiled to Python: {"uqff.py": "..."} on standard output.
// node compile.js DIRECTORY-OF-THE-COMPILER
const module_ = require(process.argv[2] + "/kaitai-struct-compiler.js");
const compiler = typeof module_ === "function" ? new module_() : module_;
const nothing = { importYaml: (name) => Promise.reject(new Error("imports " + name)) };
let text = "";
process.stdin.on("data", (part) => (text += part));
process.stdin.on("end", () =>
  compiler.compile("python", JSON.parse(text), nothing, false).then(
    (files) => process.stdout.write(JSON.stringify(files)),
    (error) => {
      console.error(String(error));
      process.exit(1);
    },
  ),
);
