//! A screen as a picture.

use std::fmt::Write;

use vt100::{Cell, Color, Screen};

/// Size of a cell.
const WIDTH: usize = 9;
const HEIGHT: usize = 18;

/// The 16 colours of a terminal, as most have them.
const COLOURS: [&str; 16] = [
    "#000000", "#cd3131", "#0dbc79", "#e5e510", "#2472c8", "#bc3fbc", "#11a8cd", "#cccccc",
    "#666666", "#f14c4c", "#23d18b", "#f5f543", "#3b8eea", "#d670d6", "#29b8db", "#ffffff",
];

fn colour(colour: Color, default: &'static str) -> &'static str {
    match colour {
        Color::Idx(index) => COLOURS.get(usize::from(index)).copied().unwrap_or(default),
        _ => default,
    }
}

/// Foreground, background, and whether it is bold.
fn style(cell: &Cell) -> (&'static str, &'static str, bool) {
    let (front, back) = (
        colour(cell.fgcolor(), "#cccccc"),
        colour(cell.bgcolor(), "#1e1e1e"),
    );
    match cell.inverse() {
        true => (back, front, cell.bold()),
        false => (front, back, cell.bold()),
    }
}

/// All that is on the screen, in SVG.
pub(crate) fn svg(screen: &Screen) -> String {
    let (rows, columns) = screen.size();
    let (rows, columns) = (rows.get(), columns.get());
    let (width, height) = (usize::from(columns) * WIDTH, usize::from(rows) * HEIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"DejaVu Sans Mono, Menlo, Consolas, monospace\" font-size=\"15\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#1e1e1e\"/>\n"
    );
    for row in 0..rows {
        let cells: Vec<_> = (0..columns)
            .filter_map(|column| screen.cell(row, column))
            .collect();
        let mut column = 0;
        for run in cells.chunk_by(|one, other| style(one) == style(other)) {
            let (front, back, bold) = style(run[0]);
            let (x, y, length) = (column * WIDTH, usize::from(row) * HEIGHT, run.len() * WIDTH);
            column += run.len();
            if back != "#1e1e1e" {
                writeln!(svg, "<rect x=\"{x}\" y=\"{y}\" width=\"{length}\" height=\"{HEIGHT}\" fill=\"{back}\"/>").unwrap();
            }
            let text: String = run
                .iter()
                .map(|cell| {
                    if cell.has_contents() {
                        cell.contents()
                    } else {
                        " "
                    }
                })
                .collect();
            if text.trim().is_empty() {
                continue;
            }
            // Each character in its column, whatever the font.
            let places: Vec<_> = (0..run.len())
                .map(|i| (x + i * WIDTH).to_string())
                .collect();
            let places = places.join(" ");
            let text = text.replace('&', "&amp;").replace('<', "&lt;");
            let weight = if bold { " font-weight=\"bold\"" } else { "" };
            let y = y + HEIGHT - 4;
            writeln!(
                svg,
                "<text x=\"{places}\" y=\"{y}\" fill=\"{front}\"{weight} xml:space=\"preserve\">{text}</text>"
            )
            .unwrap();
        }
    }
    svg + "</svg>\n"
}
