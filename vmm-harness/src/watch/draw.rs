//! How it looks.

use std::iter;
use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph};

use super::blocks::{BlockKind, BlockMap, Cell};
use super::text::{short_count, short_duration, short_rate, short_time};
use super::view::{Memory, Sample, View};
use crate::control::explain;
use crate::demo::size as size_text;
use crate::text::clean;

/// The smallest terminal with room for the sizes and a chart.
const MIN_WIDTH: u16 = 40;
const MIN_HEIGHT: u16 = 10;

/// Rows a panel has at least, its frame included.
const MIN_CHART: u16 = 5;
const MIN_BLOCKS: u16 = 4;
const MIN_LISTS: u16 = 4;

/// Rows the lists have at the most.
const MAX_LISTS: u16 = 12;

/// Columns of the table of requests, its frame included.
const REQUESTS_WIDTH: u16 = 40;

/// Columns of a label beside the chart: `1023.9 MiB`.
const LABEL_WIDTH: usize = 10;

/// A size that is charted: its glyph, colour and name, and where it is in a sample.
type Series = (char, Color, &'static str, fn(&Sample) -> u64);

const REQUESTED: Series = ('─', Color::Yellow, "requested", |sample| sample.requested);

/// From behind to the front: what is in front is less, as a rule.
const AREAS: [Series; 3] = [
    ('░', Color::Blue, "plugged", |sample| sample.plugged),
    ('▒', Color::Cyan, "online", |sample| sample.online),
    ('█', Color::Green, "resident", |sample| sample.resident),
];

/// Draws all that is known, as far as there is room: of the panels, the events go first, then the requests, then the
/// blocks.
pub fn draw(frame: &mut Frame<'_>, view: &View) {
    let area = frame.area();
    if area.width < MIN_WIDTH || area.height < MIN_HEIGHT {
        let text = format!("too small: {MIN_WIDTH} x {MIN_HEIGHT} at least\nq quit");
        frame.render_widget(Paragraph::new(text), area);
        return;
    }
    let is_wide = area.width >= 2 * MIN_WIDTH;
    let size_rows = if is_wide { 1 } else { 2 };
    let [title, sizes, state, panels, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(size_rows),
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(view.title(title.width), title);
    view.sizes(frame, sizes, is_wide);
    frame.render_widget(view.state(), state);

    let room = panels.height;
    let has_blocks = room >= MIN_CHART + MIN_BLOCKS;
    let has_lists = room >= MIN_CHART + MIN_BLOCKS + MIN_LISTS;
    let spare = room.saturating_sub(MIN_CHART + MIN_BLOCKS + MIN_LISTS);
    let lists_height = if has_lists {
        (MIN_LISTS + spare / 3).min(MAX_LISTS)
    } else {
        0
    };
    let most = if has_lists {
        MIN_BLOCKS + spare / 3
    } else {
        room.saturating_sub(MIN_CHART)
    };
    let blocks_height = if has_blocks {
        view.blocks_height(panels.width, most)
    } else {
        0
    };
    let [chart, blocks, lists] = Layout::vertical([
        Constraint::Min(0),
        Constraint::Length(blocks_height),
        Constraint::Length(lists_height),
    ])
    .areas(panels);
    view.chart(frame, chart);
    if has_blocks {
        view.blocks(frame, blocks);
    }
    if has_lists {
        let events_width = if is_wide {
            lists.width - REQUESTS_WIDTH
        } else {
            0
        };
        let [requests, events] =
            Layout::horizontal([Constraint::Min(0), Constraint::Length(events_width)]).areas(lists);
        view.requests(frame, requests);
        if is_wide {
            view.events(frame, events);
        }
    }
    let shown = [has_blocks, has_lists, has_lists && is_wide];
    let hidden = ["blocks", "requests", "events"].into_iter().zip(shown);
    let hidden: Vec<_> = hidden
        .filter(|(_, shown)| !shown)
        .map(|(name, _)| name)
        .collect();
    view.keys(frame, keys, &hidden);
}

impl View {
    fn style(&self, colour: Color) -> Style {
        match self.colours {
            true => Style::new().fg(colour),
            false => Style::new(),
        }
    }

    fn title(&self, width: u16) -> Line<'_> {
        let (right, style) = match (&self.lost, &self.memory) {
            (Some((since, _)), _) => {
                let time = short_time(self.now.saturating_sub(*since));
                (
                    format!("NO SERVER for {time}, looking for it"),
                    self.style(Color::Red),
                )
            }
            (None, Some(memory)) => (clean(&memory.state), Style::new()),
            (None, None) => ("connecting".to_owned(), Style::new()),
        };
        let right = Span::styled(right, style);
        let left = format!("vmem watch {}", self.socket);
        let room = usize::from(width).saturating_sub(right.width() + 1);
        let left = Span::raw(fit(&left, room));
        let gap = " ".repeat(usize::from(width).saturating_sub(left.width() + right.width()));
        Line::from(vec![left, Span::raw(gap), right]).style(Modifier::BOLD)
    }

    fn sizes(&self, frame: &mut Frame<'_>, area: Rect, is_wide: bool) {
        let memory = self.memory.as_ref();
        let size = |of: fn(&Memory) -> u64| memory.map_or("?".to_owned(), |m| size_text(of(m)));
        let online = memory.and_then(|memory| memory.guest.as_ref());
        let online = online.map_or("?".to_owned(), |guest| size_text(guest.online_size));
        let requested = format!("requested {}", size(|memory| memory.requested_size));
        let plugged = format!("plugged {}", size(|memory| memory.plugged_size));
        let resident = format!("resident {}", size(|memory| memory.resident_size));
        let online = format!("online {online}");
        // As wide as the longest size, and a space.
        let rows = match is_wide {
            true => vec![format!(
                "{requested:<21} {plugged:<19} {online:<18} {resident}"
            )],
            false => vec![
                format!("{requested:<21} {plugged}"),
                format!("{resident:<21} {online}"),
            ],
        };
        let lines: Vec<_> = rows.into_iter().map(Line::from).collect();
        frame.render_widget(Paragraph::new(lines), area);
    }

    fn state(&self) -> Line<'_> {
        let Some(memory) = &self.memory else {
            return Line::default();
        };
        let mut words = vec![match (memory.reason.as_deref(), memory.frozen) {
            (Some(reason), _) => Span::styled(clean(explain(reason)), self.style(Color::Yellow)),
            (None, true) => Span::styled("the size is there; frozen", self.style(Color::Yellow)),
            (None, false) => Span::styled("the size is there", self.style(Color::Green)),
        }];
        if let Some(guest) = &memory.guest {
            let driver = guest.driver_state.as_deref().unwrap_or("unknown");
            if guest.pages_wrong > 0 {
                let wrong = format!("; {} PAGES WRONG", guest.pages_wrong);
                words.push(Span::styled(wrong, self.style(Color::Red)));
            }
            let moved = short_count(guest.pages_moved);
            words.push(Span::raw(format!(
                "; driver {}; {moved} pages moved",
                clean(driver)
            )));
        }
        Line::from(words)
    }

    fn chart(&self, frame: &mut Frame<'_>, area: Rect) {
        let legend = |(glyph, colour, name, _): Series| {
            [
                Span::raw(" "),
                Span::styled(glyph.to_string(), self.style(colour)),
                Span::raw(format!(" {name}")),
            ]
        };
        let [plugged, online, resident] = AREAS;
        let above = [REQUESTED, plugged].into_iter().flat_map(legend);
        let below = [online, resident].into_iter().flat_map(legend);
        let end = || iter::once(Span::raw(" "));
        // One column for each look.
        let columns = usize::from(area.width)
            .saturating_sub(LABEL_WIDTH + 3)
            .max(2);
        let samples: Vec<_> = self.samples.iter().rev().take(columns).collect();
        let time = match (samples.first(), samples.last()) {
            (Some(last), Some(first)) => last.at.saturating_sub(first.at),
            _ => Duration::ZERO,
        };
        let block = Block::bordered()
            .title_top(Line::from_iter(above.chain(end())))
            .title_top(
                Line::from(format!(" last {} ", short_time(time))).alignment(Alignment::Right),
            )
            .title_bottom(Line::from_iter(below.chain(end())));

        let all = iter::once(REQUESTED).chain(AREAS);
        let largest = all.flat_map(|(_, _, _, of)| samples.iter().map(move |sample| of(sample)));
        // A bound that seldom changes.
        let most = largest.max().unwrap_or(0).max(1 << 20);
        let most = most.checked_next_power_of_two().unwrap_or(most);
        let points = |of: fn(&Sample) -> u64| -> Vec<(f64, f64)> {
            let looks = samples.iter().enumerate();
            let points = looks.map(|(back, sample)| (-(back as f64), of(sample) as f64));
            // A point at 0 would be a whole cell.
            points.filter(|(_, y)| *y > 0.0).collect()
        };
        let areas = AREAS.map(|(glyph, colour, _, of)| (glyph, colour, points(of), GraphType::Bar));
        let (glyph, colour, _, of) = REQUESTED;
        let line = (glyph, colour, points(of), GraphType::Scatter);
        let charted: Vec<_> = areas.into_iter().chain([line]).collect();
        let datasets = charted.iter().map(|(glyph, colour, points, kind)| {
            Dataset::default()
                .marker(Marker::Custom(*glyph))
                .graph_type(*kind)
                .style(self.style(*colour))
                .data(points)
        });
        let label = |bytes: u64| format!("{:>LABEL_WIDTH$}", size_text(bytes));
        let x_axis = Axis::default().bounds([1.0 - columns as f64, 0.0]);
        let y_axis = Axis::default().bounds([0.0, most as f64]).labels([
            label(0),
            label(most / 2),
            label(most),
        ]);
        let chart = Chart::new(datasets.collect()).block(block);
        frame.render_widget(chart.x_axis(x_axis).y_axis(y_axis), area);
    }

    /// Rows for the blocks, the frame included, `most` at the most.
    fn blocks_height(&self, width: u16, most: u16) -> u16 {
        let Some(map) = &self.blocks else {
            return MIN_BLOCKS;
        };
        let columns = map.columns(width);
        let per_cell = map.blocks_per_cell(columns * usize::from(most.saturating_sub(2)));
        let rows = map.len().div_ceil(per_cell).div_ceil(columns);
        u16::try_from(rows + 2)
            .unwrap_or(most)
            .clamp(MIN_BLOCKS, most)
    }

    fn blocks(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = usize::from(area.height.saturating_sub(2));
        let Some(map) = &self.blocks else {
            let block = Block::bordered().title_top(" blocks: none yet ");
            frame.render_widget(block, area);
            return;
        };
        let columns = map.columns(area.width);
        let per_cell = map.blocks_per_cell(columns * rows);
        let cells: Vec<_> = map.cells(per_cell).collect();
        let lines = cells
            .chunks(columns)
            .zip(0..)
            .map(|(cells, row): (&[Cell], u64)| {
                let address = map.row_address(row, (per_cell * columns) as u64);
                let start = Span::raw(format!("{address:#0$x} ", map.address_width()));
                let cells = cells.iter().map(|cell| {
                    let (glyph, colour) = look(*cell);
                    Span::styled(glyph.to_string(), self.style(colour))
                });
                Line::from_iter(iter::once(start).chain(cells))
            });
        let title = match per_cell {
            1 => format!(" {} blocks of {} ", map.len(), size_text(map.block_size)),
            _ => format!(
                " {} blocks of {}, {per_cell} in a cell ",
                map.len(),
                size_text(map.block_size)
            ),
        };
        let all = BlockKind::ALL.map(Cell::All);
        let all = all.into_iter().chain([Cell::Mixed, Cell::SomePinned]);
        let whole = self.legend(all.clone());
        // Else what must be explained here and now.
        let legend = match whole.width() <= usize::from(area.width.saturating_sub(2)) {
            true => whole,
            false => self.legend(all.filter(|cell| cells.contains(cell))),
        };
        let block = Block::bordered().title_top(title).title_bottom(legend);
        let lines: Vec<_> = lines.collect();
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }

    fn legend(&self, cells: impl Iterator<Item = Cell>) -> Line<'_> {
        let explained = cells.flat_map(|cell| {
            let (glyph, colour) = look(cell);
            let glyph = Span::styled(glyph.to_string(), self.style(colour));
            [Span::raw(" "), glyph, Span::raw(" "), Span::raw(name(cell))]
        });
        Line::from_iter(explained.chain([Span::raw(" ")]))
    }

    fn requests(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title_top(" requests ");
        let head = format!(
            "{:<14}{:>6}{:>6}{:>6}{:>6}",
            "", "count", "/s", "p50", "p99"
        );
        let requests = self.memory.iter().flat_map(|memory| &memory.requests);
        let rows = requests.map(|requests| {
            let (count, time) = self.recent(requests);
            let name = clean(&format!("{} {}", requests.request, requests.answer));
            let row = format!(
                "{:<14}{:>6}{:>6}{:>6}{:>6}",
                fit(&name, 14),
                short_count(requests.count),
                short_rate(count, time),
                short_duration(requests.p50_ns),
                short_duration(requests.p99_ns),
            );
            match requests.answer.as_str() {
                "ack" => Line::from(row),
                _ => Line::styled(row, self.style(Color::Yellow)),
            }
        });
        let lines: Vec<_> = iter::once(Line::from(head)).chain(rows).collect();
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }

    fn events(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title_top(" events, the last first ");
        let rows = usize::from(area.height.saturating_sub(2));
        let events = self.events.iter().rev().take(rows).map(|(at, text)| {
            let ago = short_time(self.now.saturating_sub(*at));
            Line::from(format!("{ago:>4} {text}"))
        });
        let lines: Vec<_> = events.collect();
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }

    fn keys(&self, frame: &mut Frame<'_>, area: Rect, hidden: &[&str]) {
        let text = match (&self.prompt, &self.message, self.lost()) {
            (Some(typed), _, _) => format!("resize to: {typed}_   Enter asks for it, Esc does not"),
            (None, Some(message), _) => message.clone(),
            (None, None, Some(reason)) => format!("q quit   {reason}"),
            (None, None, None) if hidden.is_empty() => "q quit   r resize".to_owned(),
            (None, None, None) => format!("q quit   r resize   no room: {}", hidden.join(", ")),
        };
        let text = fit(&text, usize::from(area.width));
        frame.render_widget(Paragraph::new(text).style(Modifier::REVERSED), area);
    }
}

impl BlockMap {
    /// Columns of an address in the region.
    fn address_width(&self) -> usize {
        format!("{:#x}", self.row_address(1, self.len() as u64)).len()
    }

    /// Cells in a row of a panel that is so wide: a power of two, so that rows begin at round addresses.
    fn columns(&self, width: u16) -> usize {
        // Two columns of frame, one between address and cells.
        let room = usize::from(width).saturating_sub(3 + self.address_width());
        1 << room.max(1).ilog2()
    }

    /// Where row `row` begins, of rows of so many blocks.
    fn row_address(&self, row: u64, blocks: u64) -> u64 {
        let offset = row.saturating_mul(blocks).saturating_mul(self.block_size);
        self.address.saturating_add(offset)
    }
}

/// A word for a legend.
fn name(cell: Cell) -> &'static str {
    match cell {
        Cell::All(BlockKind::Unplugged) => "unplugged",
        Cell::All(BlockKind::Plugged) => "plugged",
        Cell::All(BlockKind::Online) => "online",
        Cell::All(BlockKind::Movable) => "movable",
        Cell::All(BlockKind::Pinned) => "pinned",
        Cell::All(BlockKind::Differs) => "changing",
        Cell::Mixed => "mixed",
        // Beside `pinned`, in no room.
        Cell::SomePinned => "some",
    }
}

/// Glyph and colour; no two have the same glyph.
fn look(cell: Cell) -> (char, Color) {
    match cell {
        Cell::All(BlockKind::Unplugged) => ('.', Color::DarkGray),
        Cell::All(BlockKind::Plugged) => ('░', Color::Blue),
        Cell::All(BlockKind::Online) => ('▒', Color::Cyan),
        Cell::All(BlockKind::Movable) => ('█', Color::Green),
        Cell::All(BlockKind::Pinned) => ('P', Color::Red),
        Cell::All(BlockKind::Differs) => ('?', Color::Yellow),
        Cell::Mixed => ('%', Color::Magenta),
        Cell::SomePinned => ('p', Color::Red),
    }
}

/// `text` in `width` columns, with its end cut.
fn fit(text: &str, width: usize) -> String {
    if Span::raw(text).width() <= width {
        return text.to_owned();
    }
    let mut cut = String::new();
    for c in text.chars() {
        let longer = format!("{cut}{c}…");
        if Span::raw(longer.as_str()).width() > width {
            break;
        }
        cut.push(c);
    }
    if width > 0 {
        cut.push('…');
    }
    cut
}
