/**
 * Drives the chat of examples/web in Chromium: node drive_chat.mjs MODULES BROWSER ADDRESS PROMPTS
 *
 * PROMPTS: a JSON list of what a user says, one after another. Prints {answers, state, status,
 * facts, problems} as JSON; an answer is what the page says of it, and shown: the texts that stood
 * on the page while it was written. FOLDER: where to put light.png and dark.png.
 */

import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, program, address, prompts, folder] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "package.json"))("playwright-core");
const browser = await chromium.launch({ executablePath: program });
try {
  const page = await browser.newPage({ viewport: { width: 880, height: 620 } });
  const problems = [];
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("console", (line) => line.type() === "error" && problems.push(line.text()));
  await page.goto(address);
  await page.waitForSelector("body:not([data-state=loading])", { timeout: 120000 });
  const state = await page.getAttribute("body", "data-state");
  const answers = [];
  for (const prompt of state === "ready" ? JSON.parse(prompts) : []) {
    answers.push(await ask(page, prompt));
  }
  const [status, facts] = [await page.textContent("#status"), await page.textContent("#facts")];
  for (const colorScheme of folder ? ["light", "dark"] : []) {
    await page.emulateMedia({ colorScheme });
    await page.screenshot({ path: join(folder, `${colorScheme}.png`) });
  }
  const isolated = await page.evaluate(() => crossOriginIsolated);
  console.log(JSON.stringify({ answers, state, status, facts, isolated, problems }));
} finally {
  await browser.close();
}

async function ask(page, prompt) {
  const answered = page.evaluate(
    () =>
      new Promise((resolve) => {
        const shown = [];
        const watcher = new MutationObserver(() => {
          const last = document.querySelector("#conversation li:last-child.assistant");
          if (last) shown.push(last.textContent);
        });
        const list = document.getElementById("conversation");
        watcher.observe(list, { childList: true, characterData: true, subtree: true });
        document.addEventListener(
          "answered",
          ({ detail }) => {
            watcher.disconnect();
            resolve({ ...detail, shown: [...new Set(shown)] });
          },
          { once: true },
        );
      }),
  );
  await page.fill("#prompt", prompt);
  await page.click("#send");
  return answered;
}
