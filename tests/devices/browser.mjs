/**
 * Opens a page of examples/web in Chromium, for the programs beside it.
 *
 * Their arguments: MODULES BROWSER ADDRESS GIVEN [FOLDER]. MODULES: the folder whose node_modules
 * have playwright-core. FOLDER: where to put light.png and dark.png, pictures of the page.
 */

import { createRequire } from "node:module";
import { join } from "node:path";

/**
 * Prints what `work(page, given, folder)` finds once the page is ready, as JSON, with state, status
 * and facts of the page and the problems that it told.
 */
export async function inPage(work) {
  const [modules, program, address, given, folder] = process.argv.slice(2);
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
    const found = state === "ready" ? await work(page, given, folder) : {};
    const [status, facts] = [await page.textContent("#status"), await page.textContent("#facts")];
    for (const colorScheme of folder ? ["light", "dark"] : []) {
      await page.emulateMedia({ colorScheme });
      await page.screenshot({ path: join(folder, `${colorScheme}.png`) });
    }
    const isolated = await page.evaluate(() => crossOriginIsolated);
    console.log(JSON.stringify({ ...found, state, status, facts, isolated, problems }));
  } finally {
    await browser.close();
  }
}
