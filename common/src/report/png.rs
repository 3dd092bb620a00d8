//! A drawing as a PNG file: 8-bit RGB, as in the PNG specification (ISO/IEC 15948).

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use tiny_skia::{
    FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, Stroke, StrokeDash, Transform,
};
use ttf_parser::OutlineBuilder;

use super::drawing::{Anchor, Color, Drawing, Mark};
use super::font;

const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";

/// The file, `scale` pixels for each pixel of the drawing.
pub fn write(drawing: &Drawing, scale: u32) -> Vec<u8> {
    let (width, height) = (drawing.width * scale, drawing.height * scale);
    let mut pixmap = Pixmap::new(width, height).expect("drawings are neither empty nor huge");
    pixmap.fill(tiny_skia::Color::WHITE);
    let transform = Transform::from_scale(scale as f32, scale as f32);
    for mark in &drawing.marks {
        mark_to(&mut pixmap, mark, transform);
    }
    // White lies beneath everything, so no pixel is transparent in the end.
    let pixels = pixmap.pixels().iter();
    let rgb: Vec<u8> = pixels
        .flat_map(|p| [p.red(), p.green(), p.blue()])
        .collect();
    encode(width, height, &rgb)
}

fn mark_to(pixmap: &mut Pixmap, mark: &Mark, transform: Transform) {
    match mark {
        Mark::Line {
            points,
            color,
            width,
            dash,
        } => {
            let dash = dash.map(|(dash, gap)| vec![dash as f32, gap as f32]);
            let stroke = Stroke {
                width: *width as f32,
                line_cap: LineCap::Butt,
                line_join: LineJoin::Round,
                dash: dash.and_then(|lengths| StrokeDash::new(lengths, 0.0)),
                ..Stroke::default()
            };
            if let Some(path) = outline(points).finish() {
                pixmap.stroke_path(&path, &paint(*color, 1.0), &stroke, transform, None);
            }
        }
        Mark::Area {
            points,
            color,
            opacity,
        } => {
            let mut shape = outline(points);
            shape.close();
            fill(pixmap, shape.finish(), paint(*color, *opacity), transform);
        }
        Mark::Dot { at, radius, color } => {
            let circle = PathBuilder::from_circle(at.0 as f32, at.1 as f32, *radius as f32);
            fill(pixmap, circle, paint(*color, 1.0), transform);
        }
        Mark::Text {
            text,
            at,
            size,
            anchor,
            color,
        } => {
            let width = font::width(text, *size);
            let left = match anchor {
                Anchor::Start => at.0,
                Anchor::Middle => at.0 - width / 2.0,
                Anchor::End => at.0 - width,
            };
            let mut letters = Letters(PathBuilder::new());
            font::outline(text, *size, &mut letters);
            let there = transform.pre_translate(left as f32, at.1 as f32);
            fill(pixmap, letters.0.finish(), paint(*color, 1.0), there);
        }
    }
}

fn outline(points: &[(f64, f64)]) -> PathBuilder {
    let mut path = PathBuilder::new();
    for (i, &(x, y)) in points.iter().enumerate() {
        match i {
            0 => path.move_to(x as f32, y as f32),
            _ => path.line_to(x as f32, y as f32),
        }
    }
    path
}

fn fill(pixmap: &mut Pixmap, path: Option<Path>, paint: Paint, transform: Transform) {
    if let Some(path) = path {
        pixmap.fill_path(&path, &paint, FillRule::Winding, transform, None);
    }
}

fn paint(Color(red, green, blue): Color, opacity: f64) -> Paint<'static> {
    let mut paint = Paint::default();
    let alpha = (255.0 * opacity).round() as u8;
    paint.set_color_rgba8(red, green, blue, alpha);
    paint
}

/// Outlines of letters as a path.
struct Letters(PathBuilder);

impl OutlineBuilder for Letters {
    fn move_to(&mut self, x: f32, y: f32) {
        self.0.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        self.0.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        self.0.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        self.0.cubic_to(x1, y1, x2, y2, x, y);
    }

    fn close(&mut self) {
        self.0.close();
    }
}

/// A file with one picture: rows from top to bottom, three bytes a pixel.
fn encode(width: u32, height: u32, rgb: &[u8]) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    // 8 bits a channel, RGB, the one compression, the one filter method, not interlaced.
    header.extend([8, 2, 0, 0, 0]);
    let mut rows = ZlibEncoder::new(Vec::new(), Compression::best());
    for row in rgb.chunks_exact(3 * width as usize) {
        // Each row says how it is filtered: not at all.
        let written = rows.write_all(&[0]).and_then(|()| rows.write_all(row));
        written.expect("memory takes everything");
    }
    let rows = rows.finish().expect("memory takes everything");
    let mut file = SIGNATURE.to_vec();
    chunk(&mut file, b"IHDR", &header);
    chunk(&mut file, b"IDAT", &rows);
    chunk(&mut file, b"IEND", &[]);
    file
}

/// Length, name, content, and the checksum of the latter two.
fn chunk(file: &mut Vec<u8>, name: &[u8; 4], content: &[u8]) {
    let length = u32::try_from(content.len()).expect("pictures are far below 4 GiB");
    file.extend(length.to_be_bytes());
    file.extend(name);
    file.extend(content);
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(name);
    checksum.update(content);
    file.extend(checksum.finalize().to_be_bytes());
}
