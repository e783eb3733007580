//! One chart, drawn in the terminal and as SVG: groups of bars, a group for each row, a bar for each series.

#![allow(clippy::cast_precision_loss)] // pixels and characters

use std::fmt::Write;

/// What is drawn. A value that is not there has no bar.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Names of the bars of a group.
    pub series: Vec<String>,
    /// Name of a group and its values, as many as there are series; all positive.
    pub rows: Vec<(String, Vec<Option<Bar>>)>,
}

/// A value, and how far what it stands for was spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bar {
    /// How long the bar is.
    pub value: f64,
    /// The smallest and the largest; drawn as a line in the SVG.
    pub spread: Option<(f64, f64)>,
}

impl From<f64> for Bar {
    fn from(value: f64) -> Self {
        Self { value, spread: None }
    }
}

/// Median, smallest, largest.
impl From<(f64, f64, f64)> for Bar {
    fn from((value, low, high): (f64, f64, f64)) -> Self {
        Self { value, spread: Some((low, high)) }
    }
}

/// Widest bar of the terminal, in characters.
const BAR: f64 = 40.0;
/// Colours that also those tell apart who see few (Okabe and Ito; the last two of Tol).
const COLOURS: [&str; 10] =
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999", "#882255", "#999933"];

impl Chart {
    /// All that must find its place, the ends of the spreads too.
    fn values(&self) -> impl Iterator<Item = f64> {
        let bars = self.rows.iter().flat_map(|(_, bars)| bars.iter().flatten());
        bars.flat_map(|b| {
            let (low, high) = b.spread.unwrap_or((b.value, b.value));
            [b.value, low, high]
        })
    }

    /// Where a value stands between 0 and 1. Far apart values share a logarithmic scale.
    fn scale(&self) -> Scale {
        let (low, high) = self.values().fold((f64::INFINITY, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
        let high = if high > 0.0 { high } else { 1.0 };
        let floor = (high / low > 50.0).then(|| 10_f64.powf(low.log10().floor()) / 2.0);
        Scale { floor, high }
    }

    /// For the terminal.
    pub fn text(&self) -> String {
        let scale = self.scale();
        let width = |names: &mut dyn Iterator<Item = &String>| names.map(|n| n.chars().count()).max().unwrap_or(0);
        let (rows, series) = (width(&mut self.rows.iter().map(|r| &r.0)), width(&mut self.series.iter()));
        let mut text = format!("{}{}", self.title, if scale.floor.is_some() { " (logarithmic)" } else { "" });
        for (row, bars) in &self.rows {
            for (i, (name, bar)) in self.series.iter().zip(bars).enumerate() {
                let Some(Bar { value, .. }) = *bar else { continue };
                let label = if i == 0 { row.as_str() } else { "" };
                let bar = "█".repeat((scale.part(value) * BAR).round().max(1.0) as usize);
                // Writing to a String cannot fail.
                write!(text, "\n  {label:rows$}  {name:series$}  {bar} {}", figure(value)).unwrap_or_default();
            }
        }
        text
    }

    /// As an SVG document.
    pub fn svg(&self) -> String {
        let sheet = Sheet::new(self);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{:.0}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">{}</text>\n",
            sheet.width,
            sheet.height,
            escaped(&self.title),
        );
        sheet.put_ticks(&mut svg);
        sheet.put_legend(&mut svg);
        (0..self.rows.len()).for_each(|row| sheet.put_group(&mut svg, row));
        svg.push_str("</svg>\n");
        svg
    }
}

const LEFT: f64 = 80.0;
const LINE: f64 = 18.0;
/// Height of the highest bar.
const HIGHEST: f64 = 300.0;
/// From one bar to the next.
const STEP: f64 = 28.0;
/// Width of a character, at most.
const CHARACTER: f64 = 7.0;

/// Where things stand in the SVG, pixels.
struct Sheet<'a> {
    chart: &'a Chart,
    scale: Scale,
    width: f64,
    height: f64,
    /// Where the bars stand.
    base: f64,
    /// From one group to the next.
    group: f64,
    /// Names of a line of the legend, and from one to the next.
    columns: usize,
    column: f64,
}

/// The name of a group stands below it, a line for each of its parts.
fn parts(row: &str) -> impl Iterator<Item = &str> {
    row.split_inclusive(", ").map(str::trim_end)
}

impl<'a> Sheet<'a> {
    fn new(chart: &'a Chart) -> Self {
        let longest = |names: &mut dyn Iterator<Item = &str>| names.map(|n| n.chars().count()).max().unwrap_or(0);
        let widest = longest(&mut chart.rows.iter().flat_map(|(row, _)| parts(row)));
        let lines = chart.rows.iter().map(|(row, _)| parts(row).count()).max().unwrap_or(0);
        let series = longest(&mut chart.series.iter().map(String::as_str));
        // Long names of the legend stand below each other.
        let columns = if series > 24 { 1 } else { chart.series.len().max(1) };
        let column = (CHARACTER * series as f64 + 40.0).max(190.0);
        let group = (STEP * chart.series.len() as f64).max(CHARACTER * widest as f64) + 30.0;
        let base = 42.0 + LINE * chart.series.len().div_ceil(columns) as f64 + HIGHEST;
        let width = (group * chart.rows.len() as f64 + 40.0).max(column * columns as f64).max(580.0) + LEFT;
        Self {
            chart,
            scale: chart.scale(),
            width,
            height: base + LINE * lines as f64 + 20.0,
            base,
            group,
            columns,
            column,
        }
    }

    fn y(&self, value: f64) -> f64 {
        self.base - HIGHEST * self.scale.part(value)
    }

    fn put_ticks(&self, svg: &mut String) {
        for tick in self.scale.ticks() {
            let y = self.y(tick);
            put(
                svg,
                format_args!(
                    "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>",
                    self.width - 20.0
                ),
            );
            let (x, y) = (LEFT - 8.0, y + 4.0);
            put(svg, format_args!("<text x=\"{x:.0}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", figure(tick)));
        }
    }

    fn put_legend(&self, svg: &mut String) {
        for (i, name) in self.chart.series.iter().enumerate() {
            let x = LEFT + self.column * (i % self.columns) as f64;
            let y = 32.0 + LINE * (i / self.columns) as f64;
            let colour = COLOURS[i % COLOURS.len()];
            put(svg, format_args!("<rect x=\"{x:.0}\" y=\"{y:.0}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>"));
            put(svg, format_args!("<text x=\"{:.0}\" y=\"{:.0}\">{}</text>", x + 17.0, y + 11.0, escaped(name)));
        }
    }

    fn put_group(&self, svg: &mut String, row: usize) {
        let (name, values) = &self.chart.rows[row];
        let middle = LEFT + self.group * (row as f64 + 0.5);
        let from = middle - STEP * self.chart.series.len() as f64 / 2.0;
        for (i, bar) in values.iter().enumerate() {
            let Some(Bar { value, spread }) = *bar else { continue };
            let (x, y, colour) = (from + STEP * i as f64, self.y(value), COLOURS[i % COLOURS.len()]);
            let height = self.base - y;
            put(
                svg,
                format_args!("<rect x=\"{x:.0}\" y=\"{y:.1}\" width=\"24\" height=\"{height:.1}\" fill=\"{colour}\"/>"),
            );
            let (x, mut top) = (x + 12.0, y);
            if let Some((low, high)) = spread {
                let bottom = self.y(low);
                top = self.y(high);
                put(
                    svg,
                    format_args!(
                        "<line x1=\"{x:.0}\" x2=\"{x:.0}\" y1=\"{bottom:.1}\" y2=\"{top:.1}\" stroke=\"black\"/>"
                    ),
                );
            }
            let (y, value) = (top - 3.0, figure(value));
            put(
                svg,
                format_args!("<text x=\"{x:.0}\" y=\"{y:.1}\" text-anchor=\"middle\" font-size=\"9\">{value}</text>"),
            );
        }
        for (n, part) in parts(name).enumerate() {
            let (y, part) = (self.base + LINE * (n + 1) as f64, escaped(part));
            put(svg, format_args!("<text x=\"{middle:.0}\" y=\"{y:.0}\" text-anchor=\"middle\">{part}</text>"));
        }
    }
}

fn put(svg: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    writeln!(svg, "{line}").unwrap_or_default();
}

struct Scale {
    /// The lowest value shown on a logarithmic scale.
    floor: Option<f64>,
    high: f64,
}

impl Scale {
    fn part(&self, value: f64) -> f64 {
        match self.floor {
            Some(floor) => (value / floor).ln().max(0.0) / (self.high / floor).ln(),
            None => value / self.high,
        }
    }

    fn ticks(&self) -> Vec<f64> {
        match self.floor {
            Some(floor) => {
                let first = (floor * 2.0).log10().round() as i32;
                (first..=self.high.log10().floor() as i32).map(|e| 10_f64.powi(e)).collect()
            }
            None => {
                let step = 10_f64.powf(self.high.log10().floor());
                let step = if self.high / step < 2.0 { step / 4.0 } else { step };
                (0..=(self.high / step) as u32).map(|n| f64::from(n) * step).collect()
            }
        }
    }
}

/// Three digits that matter, thousands apart.
pub fn figure(value: f64) -> String {
    if value > 0.0 && value < 100.0 {
        return if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") };
    }
    let digits = format!("{value:.0}");
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(values: [f64; 2]) -> Chart {
        let row = ("8 <writers>".to_owned(), values.map(|v| Some(v.into())).to_vec());
        Chart { title: "saves & more".into(), series: vec!["close".into(), "relaxed".into()], rows: vec![row] }
    }

    #[test]
    fn bars_are_in_proportion() {
        let text = chart([100.0, 200.0]).text();
        let bars: Vec<_> = text.lines().map(|l| l.matches('█').count()).collect();
        assert_eq!(bars, [0, 20, 40], "{text}");
        let far = chart([10.0, 10_000.0]).text();
        assert!(far.contains("logarithmic") && far.contains("10,000"), "{far}");
    }

    #[test]
    fn the_svg_is_whole_and_escaped() {
        for values in [[100.0, 200.0], [10.0, 123_456.0], [0.5, 0.7]] {
            let svg = chart(values).svg();
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
            assert!(svg.contains("saves &amp; more") && svg.contains("8 &lt;writers&gt;"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert_eq!(svg.matches("<rect").count(), 1 + 2 + 2, "ground, legend, bars");
        }
    }

    #[test]
    fn the_spread_is_a_line_that_fits() {
        let mut spread = chart([1.0, 2.0]);
        spread.rows[0].1[1] = Some((2.0, 1.5, 3.0).into());
        let (plain, svg) = (chart([1.0, 2.0]).svg(), spread.svg());
        let lines = |svg: &str| svg.matches("stroke=\"black\"").count();
        assert_eq!((lines(&plain), lines(&svg)), (0, 1));
        // The highest of all is the end of the line, so it stands at the top and the bars below.
        let top = 42.0 + 18.0;
        assert!(svg.contains(&format!("y2=\"{top:.1}\" stroke=\"black\"")), "{svg}");
    }

    #[test]
    fn figures() {
        let shown: Vec<_> = [0.123, 12.34, 123.4, 1234.5, 1_234_567.0].into_iter().map(figure).collect();
        assert_eq!(shown, ["0.12", "12.3", "123", "1,234", "1,234,567"]);
    }
}
