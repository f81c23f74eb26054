//! The report of a stress run, in a real browser.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/browser.rs"]
mod browser;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use base64::Engine;
use browser::Browser;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A run of two guests with a budget and faults, so that there is something of everything.
const RUN: [&str; 17] = [
    "stress",
    "--resizes",
    "60",
    "--vms",
    "2",
    "--region",
    "1G",
    "--budget",
    "1536M",
    "--workload",
    "mixed",
    "--pattern",
    "random",
    "--faults",
    "open,discard,slot,busy",
    "--report",
    "DIR",
];

/// A run in which something fails soon: pinned pages are in the way of an unplug for longer than no time.
const FAILING: [&str; 15] = [
    "stress",
    "--duration",
    "1h",
    "--guest",
    "in-process",
    "--region",
    "1G",
    "--workload",
    "pin",
    "--pattern",
    "sawtooth",
    "--stuck-after",
    "0s",
    "--report",
    "DIR",
];

/// The folder and the data of the report of a run with these arguments, which ends with `code`.
fn report(args: &[&str], code: i32) -> (TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let args = args
        .iter()
        .map(|arg| if *arg == "DIR" { path } else { arg });
    let run = Command::new(env!("CARGO_BIN_EXE_vmem")).args(args).output();
    let run = run.unwrap();
    let err = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(code), "{err}");
    let json = fs::read(dir.path().join("report.json")).unwrap();
    let json = serde_json::from_slice(&json).unwrap();
    (dir, json)
}

/// A browser with the report in `dir`, if there can be one.
fn open_or_skip(dir: &TempDir, test: &str) -> Option<Browser> {
    match Browser::open(&dir.path().join("index.html"), 1000, 900) {
        Ok(browser) => Some(browser),
        Err(error) => {
            assert!(error.is_about_packages(), "{error}");
            let reason = format!("packages cannot be had: {error}");
            let mut stderr = std::io::stderr().lock();
            writeln!(stderr, "SKIPPED {test}: {reason}").unwrap();
            None
        }
    }
}

/// What each plot has to contain, by the id of its figure and the class of its elements.
fn expected(report: &Value) -> BTreeMap<(String, String), usize> {
    let mut expected = BTreeMap::new();
    let mut add = |figure: String, class: &str, count: usize| {
        *expected.entry((figure, class.to_owned())).or_default() += count;
    };
    for (index, vm) in report["vms"].as_array().unwrap().iter().enumerate() {
        for class in ["requested", "plugged", "online", "resident"] {
            let samples = vm["samples"].as_array().unwrap().len();
            assert!(samples > 2, "{vm}");
            // What goes in steps has a corner between two samples.
            let points = if class == "resident" {
                samples
            } else {
                2 * samples - 1
            };
            add(format!("memory-{index}"), &format!("line {class}"), points);
        }
        for (class, count) in [("rest", "rests"), ("life", "lives")] {
            let counts = vm["samples"].as_array().unwrap().iter();
            let counts = counts.map(|sample| sample[count].as_u64().unwrap());
            let mut distinct: Vec<_> = counts.filter(|count| *count > 0).collect();
            distinct.dedup();
            assert!(!distinct.is_empty(), "{count}");
            let class = format!("tick {class}");
            add(format!("memory-{index}"), &class, distinct.len());
        }
        add("memory-all".to_owned(), &format!("held h{index}"), 1);
        // The last one is where the one before ends.
        for map in vm["maps"].as_array().unwrap().iter().rev().skip(1) {
            let shares = map["shares"].as_str().unwrap().as_bytes();
            for run in shares.chunk_by(|a, b| a == b).filter(|run| run[0] != b'0') {
                let class = format!("share s{}", char::from(run[0]));
                add(format!("blocks-{index}"), &class, 1);
            }
        }
    }
    for latency in report["summary"]["requests"].as_array().unwrap() {
        let (request, answer) = (&latency["request"], &latency["answer"]);
        let (request, answer) = (request.as_str().unwrap(), answer.as_str().unwrap());
        let buckets = latency["buckets"].as_array().unwrap();
        let filled = buckets.iter().filter(|count| **count != 0).count();
        add(
            format!("latency-{request}-{answer}"),
            &format!("bar {answer}"),
            filled,
        );
    }
    expected
}

/// What each plot contains: points of lines, pieces of areas.
const PLOTTED: &str = r#"
[...document.querySelectorAll("polyline, path.share, path.bar, path.tick, path.held")].map(element => ({
    figure: element.closest("figure").id,
    class: element.getAttribute("class"),
    count: element.points ? element.points.numberOfItems : (element.getAttribute("d").match(/M/g) || []).length,
}))"#;

/// Each drawing: its size in CSS pixels, the least size of its letters, whether what is drawn is inside, and what its
/// vertical axis says from the top on, down to which share of its height.
const DRAWINGS: &str = r#"
[...document.querySelectorAll("svg")].map(svg => {
    const outer = svg.getBoundingClientRect();
    const frame = svg.querySelector(".frame").getBoundingClientRect();
    const inside = (elements, box, margin) => [...elements].filter(element => {
        const inner = element.getBoundingClientRect();
        return inner.left < box.left - margin || inner.right > box.right + margin
            || inner.top < box.top - margin || inner.bottom > box.bottom + margin;
    }).map(element => element.outerHTML.slice(0, 200));
    const plotted = svg.querySelectorAll("polyline, .share, .bar, .held, .rule");
    const marks = [...svg.querySelectorAll(".grid")].map(line => ({
        text: line.nextElementSibling.textContent,
        share: (line.getBoundingClientRect().top - frame.top) / frame.height,
    }));
    const letters = [...svg.querySelectorAll("text")]
        .map(text => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a);
    return {
        figure: svg.closest("figure").id, width: outer.width, height: outer.height,
        outside: inside(svg.querySelectorAll("*"), outer, 2).concat(inside(plotted, frame, 1.5)),
        marks: marks.sort((a, b) => a.share - b.share), letters: Math.min(...letters),
    };
})"#;

/// Elements that are wider than the page, except what is scrolled.
const TOO_WIDE: &str = r#"
[...document.querySelectorAll("body *")].filter(element => !element.closest(".plot > *")
    && element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
    .map(element => element.outerHTML.slice(0, 200))"#;

/// Each line that marks something: in which figure, what it is, and where in the frame, as shares from the left and the
/// top; and the highest place of what is held below it.
const RULES: &str = r#"
[...document.querySelectorAll(".rule")].map(rule => {
    const svg = rule.closest("svg"), frame = svg.querySelector(".frame").getBoundingClientRect();
    const box = rule.getBoundingClientRect();
    const tops = [...svg.querySelectorAll(".held")].map(held => held.getBoundingClientRect().top);
    return {
        figure: rule.closest("figure").id, class: rule.getAttribute("class"),
        text: rule.nextElementSibling.textContent,
        across: ((box.left + box.right) / 2 - frame.left) / frame.width,
        down: ((box.top + box.bottom) / 2 - frame.top) / frame.height,
        held: (Math.min(...tops) - frame.top) / frame.height,
    };
})"#;

/// The rows above the plots.
const FACTS: &str = r#"
Object.fromEntries([...document.querySelectorAll("dt")].map(dt => [dt.textContent, dt.nextElementSibling.textContent]))"#;

/// Colours in use: of the page, and of what is to be seen on it.
const COLOURS: &str = r#"({
    page: getComputedStyle(document.body).backgroundColor,
    inks: [
        getComputedStyle(document.body).color,
        getComputedStyle(document.querySelector("svg text")).fill,
        getComputedStyle(document.querySelector("h1 span")).color,
        ...[...document.querySelectorAll(".line")].map(line => getComputedStyle(line).stroke),
        ...[...document.querySelectorAll(".bar")].map(bar => getComputedStyle(bar).fill),
    ],
})"#;

fn rgb(colour: &Value) -> [f64; 3] {
    let text = colour.as_str().unwrap();
    let numbers: Vec<f64> = text
        .trim_start_matches("rgb(")
        .trim_end_matches(')')
        .split(", ")
        .map(|number| number.parse().unwrap())
        .collect();
    numbers.try_into().unwrap()
}

/// The contrast of two colours, as WCAG 2.1 defines it.
fn contrast(one: [f64; 3], other: [f64; 3]) -> f64 {
    let luminance = |colour: [f64; 3]| {
        let linear = colour.map(|value| match value / 255.0 {
            v if v <= 0.03928 => v / 12.92,
            v => ((v + 0.055) / 1.055).powf(2.4),
        });
        0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    };
    let (one, other) = (luminance(one), luminance(other));
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}

fn emulate(browser: &mut Browser, media: &str, scheme: &str) {
    let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
    let params = json!({ "media": media, "features": [feature] });
    browser.ask("Emulation.setEmulatedMedia", params);
}

fn check_readable(browser: &mut Browser) -> [f64; 3] {
    let bare = "[...document.querySelectorAll('.key:not(.s0)')].filter(key => \
                getComputedStyle(key, '::before').backgroundColor === 'rgba(0, 0, 0, 0)').length";
    assert_eq!(browser.evaluate(bare), 0, "keys without a colour");
    let colours = browser.evaluate(COLOURS);
    let page = rgb(&colours["page"]);
    for ink in colours["inks"].as_array().unwrap() {
        // 3 is what graphics need.
        assert!(contrast(page, rgb(ink)) >= 3.0, "{ink} on {page:?}");
    }
    let text = rgb(&colours["inks"][0]);
    assert!(contrast(page, text) >= 7.0, "{text:?} on {page:?}");
    page
}

fn check_fits(browser: &mut Browser) {
    let drawings = browser.evaluate(DRAWINGS);
    let drawings = drawings.as_array().unwrap();
    assert!(!drawings.is_empty());
    for drawing in drawings {
        assert!(drawing["width"].as_f64().unwrap() > 200.0, "{drawing}");
        assert!(drawing["height"].as_f64().unwrap() > 50.0, "{drawing}");
        assert!(drawing["letters"].as_f64().unwrap() >= 8.5, "{drawing}");
        assert_eq!(drawing["outside"], json!([]), "{drawing}");
        let top = drawing["marks"][0]["share"].as_f64().unwrap();
        assert!(
            top.abs() < 0.01,
            "the axis has no mark at its end: {drawing}"
        );
    }
    let marks = |figure: &str| -> Vec<&str> {
        let drawing = drawings.iter().find(|drawing| drawing["figure"] == figure);
        let marks = drawing.unwrap()["marks"].as_array().unwrap().iter();
        marks.map(|mark| mark["text"].as_str().unwrap()).collect()
    };
    assert_eq!(marks("memory-0"), marks("blocks-0"));
    assert_eq!(browser.evaluate(TOO_WIDE), json!([]));
    let overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert_eq!(browser.evaluate(overflow), 0);
}

/// Whether the page, printed as browsers do, without backgrounds, has an area of the colour of `class`.
fn is_printed(browser: &mut Browser, class: &str) -> bool {
    let colour = browser.evaluate(&format!(
        "getComputedStyle(document.querySelector('.key.{class}'), '::before').backgroundColor"
    ));
    let printed = browser.ask("Page.printToPDF", json!({ "printBackground": false }));
    let pdf = base64::engine::general_purpose::STANDARD
        .decode(printed["data"].as_str().unwrap())
        .unwrap();
    let wanted = rgb(&colour).map(|value| value / 255.0);
    // A colour is set for what follows, and `f` fills with it.
    let fills = |content: &str| {
        let mut is_wanted = false;
        content.lines().any(|line| {
            if let Some(numbers) = line.strip_suffix(" rg") {
                let words = numbers
                    .rsplit(' ')
                    .take(3)
                    .map_while(|word| word.parse().ok());
                let words: Vec<f64> = words.collect();
                let near = |(a, b): (&f64, &f64)| (a - b).abs() < 0.002;
                is_wanted = words.len() == 3 && words.iter().rev().zip(&wanted).all(near);
            }
            is_wanted && line == "f"
        })
    };
    let find = |from: usize, word: &[u8]| {
        let at = pdf[from..]
            .windows(word.len())
            .position(|bytes| bytes == word);
        at.map(|at| from + at)
    };
    let mut from = 0;
    while let Some(begin) = find(from, b"stream\n") {
        let begin = begin + b"stream\n".len();
        from = find(begin, b"endstream").unwrap() + b"endstream".len();
        let mut content = Vec::new();
        let mut decoder = flate2::read::ZlibDecoder::new(&pdf[begin..from]);
        // Fonts and pictures are in other formats.
        if decoder.read_to_end(&mut content).is_ok() && fills(&String::from_utf8_lossy(&content)) {
            return true;
        }
    }
    false
}

/// Pixels of the page as they are seen, by colour.
fn screenshot(browser: &mut Browser, keep: Option<&Path>) -> BTreeMap<[u8; 3], usize> {
    let params = json!({ "format": "png", "captureBeyondViewport": keep.is_none() });
    let answer = browser.ask("Page.captureScreenshot", params);
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(answer["data"].as_str().unwrap())
        .unwrap();
    if let Some(path) = keep {
        fs::write(path, &bytes).unwrap();
    }
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    let mut counts = BTreeMap::new();
    for pixel in pixels[..info.buffer_size()].chunks(info.color_type.samples()) {
        *counts.entry([pixel[0], pixel[1], pixel[2]]).or_default() += 1;
    }
    counts
}

fn check_drawn(browser: &mut Browser) {
    let counts = screenshot(browser, None);
    let background = counts.values().max().unwrap();
    let total: usize = counts.values().sum();
    // Plots are mostly empty, but not quite.
    assert!(
        *background < total * 99 / 100,
        "{background} of {total} pixels"
    );
    assert!(counts.len() > 20, "{} colours", counts.len());
    let plugged =
        browser.evaluate("getComputedStyle(document.querySelector('.line.plugged')).stroke");
    let plugged = rgb(&plugged);
    let drawn = counts
        .iter()
        .find(|(pixel, _)| pixel.map(f64::from) == plugged);
    assert!(drawn.is_some_and(|(_, count)| *count > 500), "{plugged:?}");
}

#[test]
fn the_report_is_whole_self_contained_and_readable() {
    let (dir, report) = report(&RUN, 0);
    let test = "the_report_is_whole_self_contained_and_readable";
    let Some(mut browser) = open_or_skip(&dir, test) else {
        return;
    };

    let csv = fs::read_to_string(dir.path().join("samples.csv")).unwrap();
    let samples = report["vms"].as_array().unwrap().iter();
    let samples: usize = samples
        .map(|vm| vm["samples"].as_array().unwrap().len())
        .sum();
    assert_eq!(csv.lines().count(), 1 + samples);
    let columns: Vec<_> = csv.lines().map(|line| line.split(',').count()).collect();
    assert!(columns.iter().all(|count| *count == columns[0]));

    let mut found = BTreeMap::new();
    let plotted = browser.evaluate(PLOTTED);
    for element in plotted.as_array().unwrap() {
        let text = |key: &str| element[key].as_str().unwrap().to_owned();
        let count = element["count"].as_u64().unwrap() as usize;
        found.insert((text("figure"), text("class")), count);
    }
    for (element, count) in expected(&report) {
        assert_eq!(found.get(&element), Some(&count), "{element:?}");
    }
    for figure in ["rate-moved", "rate-verified", "rate-resizes"] {
        let mut lines = found.iter().filter(|((id, _), _)| id == figure);
        assert!(lines.any(|(_, count)| *count > 2), "{figure}");
    }

    let options = &report["run"]["options"];
    let facts = browser.evaluate(FACTS);
    for (option, value, fact, text) in [
        ("workload", json!("mixed"), "workload", "mixed"),
        ("pattern", json!("random"), "pattern", "random"),
        (
            "faults",
            json!(["open", "discard", "slot", "busy"]),
            "faults",
            "open, discard, slot, busy",
        ),
        ("seconds", json!(null), "limit", "60 resizes"),
        ("resizes", json!(60), "limit", "60 resizes"),
        ("stuck_after", json!(30.0), "stuck after", "30s"),
        ("vms", json!(2), "guests", "2"),
        ("vcpus", json!(2), "vCPUs", "2"),
        ("budget", json!(1536_u64 << 20), "budget", "1.5 GiB"),
        ("guest", json!("auto"), "run on", "auto"),
        ("backing", json!("anon"), "backing", "anon"),
        ("policy", json!("direct"), "policy", "direct"),
        ("mode", json!(null), "mode", "the driver's choice"),
        ("region", json!(1_u64 << 30), "region", "1 GiB"),
        ("slot_size", json!(null), "slot size", "the device's choice"),
    ] {
        assert_eq!(
            (&options[option], &facts[fact]),
            (&value, &json!(text)),
            "{option}"
        );
    }

    let rules = browser.evaluate(RULES);
    let [budget] = rules.as_array().unwrap().as_slice() else {
        panic!("{rules}");
    };
    assert_eq!(budget["text"], "budget 1.5 GiB");
    // Within its axis, and nothing above it.
    let down = budget["down"].as_f64().unwrap();
    assert!(
        down > 0.05 && budget["held"].as_f64().unwrap() >= down - 0.01,
        "{budget}"
    );
    for held in report["held"].as_array().unwrap() {
        let bytes = held["bytes"].as_array().unwrap().iter();
        let sum: u64 = bytes.map(|bytes| bytes.as_u64().unwrap()).sum();
        assert!(sum <= 1536 << 20, "{held}");
    }

    for (media, scheme) in [
        ("screen", "light"),
        ("screen", "dark"),
        ("print", "light"),
        ("print", "dark"),
    ] {
        emulate(&mut browser, media, scheme);
        check_fits(&mut browser);
        let page = check_readable(&mut browser);
        assert_eq!(
            page[0] < 128.0,
            (media, scheme) == ("screen", "dark"),
            "{media} {scheme} {page:?}"
        );
        check_drawn(&mut browser);
    }
    // Lines of that colour are drawn anyway, areas only for the legend.
    assert!(is_printed(&mut browser, "online"));
    // As wide as a telephone, with a scrollbar that takes room.
    emulate(&mut browser, "screen", "light");
    for width in [360, 400, 620] {
        let narrow =
            json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": false });
        browser.ask("Emulation.setDeviceMetricsOverride", narrow);
        check_fits(&mut browser);
    }

    let troubles = [
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Log.entryAdded",
    ];
    for event in &browser.events {
        let method = event["method"].as_str().unwrap();
        assert!(!troubles.contains(&method), "{event}");
        if method == "Network.requestWillBeSent" {
            let url = event["params"]["request"]["url"].as_str().unwrap();
            assert!(
                url.ends_with("/index.html") || url.starts_with("data:"),
                "{url}"
            );
        }
    }
}

#[test]
fn a_failure_is_where_it_was() {
    let (dir, report) = report(&FAILING, 1);
    let failure = &report["failure"];
    assert_eq!(report["run"]["options"]["budget"], json!(null));
    assert_eq!(failure["check"], "no-resize-is-stuck");
    let Some(mut browser) = open_or_skip(&dir, "a_failure_is_where_it_was") else {
        return;
    };
    check_fits(&mut browser);
    check_readable(&mut browser);
    let share =
        failure["seconds"].as_f64().unwrap() / report["summary"]["seconds"].as_f64().unwrap();
    let rules = browser.evaluate(RULES);
    let mut figures = Vec::new();
    for rule in rules.as_array().unwrap() {
        assert_eq!(rule["class"], "rule failure");
        assert_eq!(rule["text"], "no-resize-is-stuck");
        assert!(
            (rule["across"].as_f64().unwrap() - share).abs() < 0.01,
            "{share}: {rule}"
        );
        figures.push(rule["figure"].as_str().unwrap());
    }
    assert_eq!(
        figures,
        [
            "memory-0",
            "blocks-0",
            "rate-moved",
            "rate-verified",
            "rate-resizes"
        ]
    );
    let text = browser.evaluate("document.querySelector('p.failure').textContent");
    assert!(
        text.as_str()
            .unwrap()
            .contains(failure["message"].as_str().unwrap()),
        "{text}"
    );
}

/// Not a test: makes the picture of the README, as
/// `VMEM_REPORT=DIR VMEM_PICTURE=FILE cargo test -p vmm-harness --test report -- --ignored`.
#[test]
#[ignore = "makes a picture of a report that is there"]
fn picture() {
    let variable = |name| std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set"));
    let page = Path::new(&variable("VMEM_REPORT")).join("index.html");
    let mut browser = Browser::open(&page, 1000, 1535).unwrap();
    browser.evaluate("document.documentElement.style.scrollbarWidth = 'none'");
    let counts = screenshot(&mut browser, Some(Path::new(&variable("VMEM_PICTURE"))));
    assert!(counts.len() > 20);
}
