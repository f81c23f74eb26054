//! The report of a stress run, in a real browser.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "common/browser.rs"]
mod browser;

use browser::Browser;

#[test]
fn a_browser() {
    std::fs::write(
        "/tmp/h/stress/x.html",
        "<p>hello</p><script>console.log(1)</script>",
    )
    .unwrap();
    let mut b = Browser::open(std::path::Path::new("/tmp/h/stress/x.html"), 800, 600).unwrap();
    eprintln!(
        "{}",
        b.evaluate("document.body.getBoundingClientRect().width")
    );
    for e in &b.events {
        eprintln!("{e}");
    }
}
