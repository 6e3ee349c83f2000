/**
 * Drives examples/web: node drive_page.mjs MODULES BROWSER ADDRESS PICTURE [FOLDER]
 *
 * Prints what the page found in the picture, and what browser.mjs tells.
 */

import { inPage } from "./browser.mjs";

await inPage(async (page, picture, folder) => {
  let found = {};
  for (let turn = 0; turn < (folder ? 8 : 1); turn++) {
    found = await classify(page, picture); // the later, the faster: V8 compiles again what runs often
  }
  return found;
});

async function classify(page, picture) {
  const classified = page.evaluate(
    () =>
      new Promise((resolve) => {
        document.addEventListener("classified", ({ detail }) => resolve(detail), { once: true });
      }),
  );
  await page.setInputFiles("#file", []);
  await page.setInputFiles("#file", picture);
  return classified;
}
