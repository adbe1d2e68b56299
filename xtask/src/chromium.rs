//! `report.html` in headless Chromium: wide and narrow, light and dark. A probe at the end of a copy of the page looks
//! for what does not fit, cannot be read or was loaded; broken pages show that it finds such things.

use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PROBE: &str = include_str!("report_probe.js");
/// A page around the page: a window cannot be as narrow as a phone. It takes down what the probe says.
const FRAME: &str = "<!DOCTYPE html><meta charset=\"utf-8\"><style>iframe { border: 0 }</style><pre id=\"probe\"></pre>\
                     <script>onmessage = (message) => { probe.textContent = message.data; };</script>";
/// Wide as a desk and as a phone.
const WINDOWS: [(u32, u32); 2] = [(1280, 800), (360, 740)];
const PATIENCE: Duration = Duration::from_secs(120);

/// Checks the page in every window and colour scheme, then that broken ones are found.
pub(crate) fn check_pages(chromium: &Path, work: &Path, pages: &[PathBuf]) -> Result<()> {
    let browser = Browser { program: chromium, work };
    for page in pages {
        let text = std::fs::read_to_string(page).with_context(|| page.display().to_string())?;
        for window in WINDOWS {
            for dark in [false, true] {
                let found = browser.probe(&text, window, dark)?;
                let place = format!("{}, {}x{}, dark: {dark}", page.display(), window.0, window.1);
                ensure!(found.is_empty(), "{place}:\n  {}", found.join("\n  "));
            }
        }
    }
    let Some(page) = pages.first() else { return Ok(()) };
    let text = std::fs::read_to_string(page)?;
    let broken = [
        ("</style>", "footer { color: #999; background: #aaa }</style>", "contrast"),
        ("<main>", "<main><p style=\"width: 90rem\">wide</p>", "the page is"),
        ("<main>", "<main><img alt=\"\" src=\"missing.png\">", "console: "),
        ("<section id=\"memory\">", "<section hidden id=\"memory\">", "section memory"),
        ("chip.open = open", "chip.open = null.open", "console: "),
    ];
    for (whole, part, finding) in broken {
        ensure!(text.contains(whole), "`{whole}` is not in {}", page.display());
        let found = browser.probe(&text.replacen(whole, part, 1), WINDOWS[0], false)?;
        let noticed = found.iter().any(|line| line.contains(finding));
        ensure!(noticed, "`{part}` was not noticed:\n  {}", found.join("\n  "));
    }
    Ok(())
}

struct Browser<'a> {
    program: &'a Path,
    work: &'a Path,
}

impl Browser<'_> {
    /// What is wrong with a page.
    fn probe(&self, page: &str, (width, height): (u32, u32), dark: bool) -> Result<Vec<String>> {
        let expected = format!("const EXPECTED = {{ width: {width}, dark: {dark} }};");
        let Some((body, end)) = page.rsplit_once("</body>") else { bail!("the page has no end") };
        let probed = format!("{body}<script>{expected}\n{PROBE}</script>\n</body>{end}");
        std::fs::write(self.work.join("probed.html"), probed)?;
        let frame = self.work.join("frame.html");
        std::fs::write(
            &frame,
            format!("{FRAME}<iframe src=\"probed.html\" width=\"{width}\" height=\"{height}\"></iframe>"),
        )?;
        let scheme = if dark { "preferredColorScheme=0" } else { "preferredColorScheme=1" };
        let (dom, log) = self.run(&[
            format!("--blink-settings={scheme}"),
            "--window-size=1400,900".into(),
            "--virtual-time-budget=10000".into(),
            "--dump-dom".into(),
            format!("file://{}", frame.display()),
        ])?;
        let mut found: Vec<String> = log
            .lines()
            .filter_map(|line| Some(format!("console: {}", line.split_once("CONSOLE")?.1)))
            .collect();
        let said = dom.rsplit_once("<pre id=\"probe\">").and_then(|(_, rest)| rest.split_once("</pre>"));
        match said {
            Some(("all well", _)) => {}
            Some(("", _)) | None => found.push("the probe did not come to its end".into()),
            Some((wrong, _)) => found.extend(wrong.lines().map(str::to_owned)),
        }
        Ok(found)
    }

    /// Standard output and standard error of the browser.
    fn run(&self, arguments: &[String]) -> Result<(String, String)> {
        let (out, err) = (self.work.join("chromium.out"), self.work.join("chromium.err"));
        let mut child = Command::new(self.program)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
            ])
            .args(["--hide-scrollbars", "--enable-logging=stderr", "--disable-background-networking"])
            .arg(format!("--user-data-dir={}", self.work.join("chromium-profile").display()))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                bail!("{} did not end within {} s", self.program.display(), PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let read =
            |path: &Path| std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let (out, err) = (read(&out)?, read(&err)?);
        if status.success() { Ok((out, err)) } else { bail!("{} failed: {err}", self.program.display()) }
    }
}
