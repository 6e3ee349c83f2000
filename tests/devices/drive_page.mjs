/**
 * Drives examples/web in Chromium: node drive_page.mjs MODULES BROWSER ADDRESS PICTURE [FOLDER]
 *
 * Prints what the page found, as JSON. FOLDER: where to put light.png and dark.png, pictures of
 * the page. MODULES: the folder whose node_modules have playwright-core.
 */

import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, program, address, picture, folder] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "package.json"))("playwright-core");
const browser = await chromium.launch({ executablePath: program });
try {
  const page = await browser.newPage({ viewport: { width: 880, height: 620 } });
  const problems = [];
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("console", (line) => line.type() === "error" && problems.push(line.text()));
  await page.goto(address);
  await page.waitForSelector("body:not([data-state=loading])");
  const state = await page.getAttribute("body", "data-state");
  let found = {};
  for (let turn = 0; state === "ready" && turn < (folder ? 8 : 1); turn++) {
    found = await classify(page); // the later, the faster: V8 compiles again what runs often
  }
  const [status, facts] = [await page.textContent("#status"), await page.textContent("#facts")];
  for (const colorScheme of folder ? ["light", "dark"] : []) {
    await page.emulateMedia({ colorScheme });
    await page.screenshot({ path: join(folder, `${colorScheme}.png`) });
  }
  console.log(JSON.stringify({ ...found, state, status, facts, problems }));
} finally {
  await browser.close();
}

async function classify(page) {
  const classified = page.evaluate(
    () =>
      new Promise((resolve) => {
        document.addEventListener("classified", ({ detail }) => resolve(detail), { once: true });
      }),
  );
  await page.setInputFiles("#file", []);
  await page.setInputFiles("#file", picture);
  return { ...(await classified), isolated: await page.evaluate(() => crossOriginIsolated) };
}
