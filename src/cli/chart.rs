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
/// Colours that also those tell apart who see few (Okabe and Ito).
const COLOURS: [&str; 8] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"];

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
        const LEFT: f64 = 80.0;
        const HEIGHT: f64 = 300.0;
        const BOTTOM: f64 = 60.0;
        let scale = self.scale();
        let group = 28.0 * self.series.len() as f64 + 30.0;
        let longest = self.series.iter().map(|s| s.chars().count()).max().unwrap_or(0);
        // Long names stand below each other.
        let columns = if longest > 24 { 1 } else { self.series.len().max(1) };
        let column = (7.0 * longest as f64 + 40.0).max(190.0);
        let base = 42.0 + 18.0 * self.series.len().div_ceil(columns) as f64 + HEIGHT;
        let width = (LEFT + group * self.rows.len() as f64 + 40.0).max(LEFT + column * columns as f64).max(660.0);
        let y = |value: f64| base - HEIGHT * scale.part(value);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{:.0}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">{}</text>\n",
            base + BOTTOM,
            escaped(&self.title),
        );
        let mut put = |line: std::fmt::Arguments<'_>| svg.write_fmt(line).unwrap_or_default();
        for tick in scale.ticks() {
            put(format_args!(
                "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{2:.0}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>\n",
                width - 20.0,
                y(tick),
                LEFT - 8.0,
                y(tick) + 4.0,
                figure(tick),
            ));
        }
        for (i, name) in self.series.iter().enumerate() {
            let (x, y) = (LEFT + column * (i % columns) as f64, 32.0 + 18.0 * (i / columns) as f64);
            let colour = COLOURS[i % COLOURS.len()];
            put(format_args!(
                "<rect x=\"{x:.0}\" y=\"{y:.0}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
                 <text x=\"{:.0}\" y=\"{:.0}\">{}</text>\n",
                x + 17.0,
                y + 11.0,
                escaped(name),
            ));
        }
        for (r, (row, bars)) in self.rows.iter().enumerate() {
            let from = LEFT + group * r as f64 + 15.0;
            for (i, bar) in bars.iter().enumerate() {
                let Some(Bar { value, spread }) = *bar else { continue };
                let (x, top, colour) = (from + 28.0 * i as f64, y(value), COLOURS[i % COLOURS.len()]);
                let (low, high) = spread.unwrap_or((value, value));
                put(format_args!(
                    "<rect x=\"{x:.0}\" y=\"{top:.1}\" width=\"24\" height=\"{:.1}\" fill=\"{colour}\"/>\
                     <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"9\">{}</text>\n",
                    base - top,
                    x + 12.0,
                    y(high) - 3.0,
                    figure(value),
                ));
                if spread.is_some() {
                    put(format_args!(
                        "<line x1=\"{0:.0}\" x2=\"{0:.0}\" y1=\"{1:.1}\" y2=\"{2:.1}\" stroke=\"black\"/>\n",
                        x + 12.0,
                        y(low),
                        y(high),
                    ));
                }
            }
            put(format_args!(
                "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>\n",
                from + 14.0 * self.series.len() as f64,
                base + 20.0,
                escaped(row),
            ));
        }
        svg.push_str("</svg>\n");
        svg
    }
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
