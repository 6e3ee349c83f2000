/**
 * Drives the chat of examples/web: node drive_chat.mjs MODULES BROWSER ADDRESS PROMPTS [FOLDER]
 *
 * PROMPTS: a JSON list of what a user says, one after another. Prints {answers, ...} (browser.mjs);
 * an answer is what the page says of it, and shown: the texts that stood on the page while it was
 * written.
 */

import { inPage } from "./browser.mjs";

await inPage(async (page, prompts) => {
  const answers = [];
  for (const prompt of JSON.parse(prompts)) answers.push(await ask(page, prompt));
  return { answers };
});

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
