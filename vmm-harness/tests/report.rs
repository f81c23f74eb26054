//! The report of a stress run, in a real browser.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/browser.rs"]
mod browser;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
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

fn report() -> (TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let args = RUN.map(|arg| if arg == "DIR" { path } else { arg });
    let run = Command::new(env!("CARGO_BIN_EXE_vmem")).args(args).output();
    let run = run.unwrap();
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let json = fs::read(dir.path().join("report.json")).unwrap();
    let json = serde_json::from_slice(&json).unwrap();
    (dir, json)
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
        for map in vm["maps"].as_array().unwrap() {
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
[...document.querySelectorAll("polyline, path.share, path.bar")].map(element => ({
    figure: element.closest("figure").id,
    class: element.getAttribute("class"),
    count: element.points ? element.points.numberOfItems : (element.getAttribute("d").match(/M/g) || []).length,
}))"#;

/// Size of each drawing, in CSS pixels, and whether its texts and lines are inside.
const SIZES: &str = r#"
[...document.querySelectorAll("svg")].map(svg => {
    const outer = svg.getBoundingClientRect();
    const within = [...svg.querySelectorAll("*")].every(element => {
        const inner = element.getBoundingClientRect();
        return inner.left >= outer.left - 2 && inner.right <= outer.right + 2
            && inner.top >= outer.top - 2 && inner.bottom <= outer.bottom + 2;
    });
    return { figure: svg.closest("figure").id, width: outer.width, height: outer.height, within };
})"#;

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
    let sizes = browser.evaluate(SIZES);
    let sizes = sizes.as_array().unwrap();
    assert!(!sizes.is_empty());
    for size in sizes {
        assert!(size["width"].as_f64().unwrap() > 200.0, "{size}");
        assert!(size["height"].as_f64().unwrap() > 50.0, "{size}");
        assert_eq!(size["within"], true, "{size}");
    }
    let overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert_eq!(browser.evaluate(overflow), 0);
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
    let (dir, report) = report();
    let page = dir.path().join("index.html");
    let mut browser = match Browser::open(&page, 1000, 900) {
        Ok(browser) => browser,
        Err(error) => {
            assert!(error.is_about_packages(), "{error}");
            let mut stderr = std::io::stderr().lock();
            writeln!(
                stderr,
                "SKIPPED the_report_is_whole_self_contained_and_readable: packages cannot be had: {error}"
            )
            .unwrap();
            return;
        }
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
    for figure in ["memory-all", "rate-moved", "rate-verified", "rate-resizes"] {
        let mut lines = found.iter().filter(|((id, _), _)| id == figure);
        assert!(lines.any(|(_, count)| *count > 2), "{figure}");
    }

    for (media, scheme) in [("screen", "light"), ("screen", "dark"), ("print", "light")] {
        emulate(&mut browser, media, scheme);
        check_fits(&mut browser);
        let page = check_readable(&mut browser);
        assert_eq!(
            page[0] < 128.0,
            scheme == "dark",
            "{media} {scheme} {page:?}"
        );
        check_drawn(&mut browser);
    }
    // As wide as a telephone.
    let narrow = json!({ "width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": false });
    emulate(&mut browser, "screen", "light");
    browser.ask("Emulation.setDeviceMetricsOverride", narrow);
    check_fits(&mut browser);

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

/// Not a test: makes the picture of the README, as
/// `VMEM_REPORT=DIR VMEM_PICTURE=FILE cargo test -p vmm-harness --test report -- --ignored`.
#[test]
#[ignore = "makes a picture of a report that is there"]
fn picture() {
    let variable = |name| std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set"));
    let page = Path::new(&variable("VMEM_REPORT")).join("index.html");
    let mut browser = Browser::open(&page, 1000, 1420).unwrap();
    let counts = screenshot(&mut browser, Some(Path::new(&variable("VMEM_PICTURE"))));
    assert!(counts.len() > 20);
}
