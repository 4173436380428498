//! Recognizes files of other formats that are named as layers or raw images by mistake.
//!
//! Only error messages depend on the result; a file of another format is never opened.

use std::fmt;

use super::{lsmt, tar, zfile};

/// Number of bytes at the start and at the end of a file that are examined.
pub const LOOKED_AT: usize = 512;

/// Format of a file that is neither a layer nor a raw disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// A disk image; the name of the format is that of `qemu-img`.
    Image(&'static str),
    /// Text that starts like JSON.
    Json,
    /// Compressed data, such as an ordinary OCI layer.
    Compressed(&'static str),
    /// An OverlayBD layer, which is foreign where a raw image is expected.
    Layer,
}

/// First bytes of files, and their format.
const STARTS: [(&[u8], Foreign); 11] = [
    (b"QFI\xfb\0\0\0\x01", Foreign::Image("qcow")),
    (b"QFI\xfb", Foreign::Image("qcow2")),
    (b"QED\0", Foreign::Image("qed")),
    (b"KDMV", Foreign::Image("vmdk")),
    (b"COWD", Foreign::Image("vmdk")),
    (b"# Disk DescriptorFile", Foreign::Image("vmdk")),
    (VHD, Foreign::Image("vhd")),
    (b"vhdxfile", Foreign::Image("vhdx")),
    (b"<<< ", Foreign::Image("vdi")),
    (b"\x1f\x8b", Foreign::Compressed("gzip")),
    (b"\x28\xb5\x2f\xfd", Foreign::Compressed("zstd")),
];

/// Start of the footer of a VHD. A dynamic VHD has a copy at its start.
const VHD: &[u8] = b"conectix";

impl Foreign {
    /// Recognizes a file by its first bytes.
    pub fn by_start(start: &[u8]) -> Option<Self> {
        let known = STARTS.iter().find(|(magic, _)| start.starts_with(magic));
        match start.trim_ascii_start() {
            [b'{', ..] => Some(Self::Json),
            _ => known.map(|(_, kind)| *kind),
        }
    }

    /// Recognizes a file that is given as a raw image by its first bytes.
    pub fn by_start_of_raw_image(start: &[u8]) -> Option<Self> {
        let is_layer =
            |bytes: &[u8]| lsmt::Header::has_magic(bytes) || zfile::Header::has_magic(bytes);
        let wrapped = tar::payload(start).ok().flatten();
        let wrapped =
            wrapped.and_then(|wrapped| start.get(usize::try_from(wrapped.offset).ok()?..));
        match is_layer(start) || wrapped.is_some_and(is_layer) {
            true => Some(Self::Layer),
            // A disk may start with a brace.
            false => Self::by_start(start).filter(|kind| *kind != Self::Json),
        }
    }

    /// Recognizes a file by its last [`LOOKED_AT`] bytes: a VHD of fixed size has its header at the end.
    pub fn by_end(end: &[u8]) -> Option<Self> {
        end.starts_with(VHD).then_some(Self::Image("vhd"))
    }
}

impl Foreign {
    /// What the user should do with such a file.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Image(_) => "convert it with `qemu-img convert -O raw`",
            Self::Json => "name an image config with --config",
            Self::Compressed(_) => "decompress it",
            Self::Layer => "write its disk as a raw image with `ovbd export`",
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(format) => write!(f, "is a {format} image"),
            Self::Json => f.write_str("looks like a JSON file"),
            Self::Compressed(format) => write!(f, "is compressed with {format}"),
            Self::Layer => f.write_str("is an OverlayBD layer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_their_bytes() {
        for (start, expected) in [
            (&b"QFI\xfb\0\0\0\x03..."[..], "is a qcow2 image"),
            (b"QFI\xfb\0\0\0\x01...", "is a qcow image"),
            (b"KDMV\x01", "is a vmdk image"),
            (b"# Disk DescriptorFile\nversion=1", "is a vmdk image"),
            (b"conectix\0", "is a vhd image"),
            (b"vhdxfile", "is a vhdx image"),
            (b" \n{\"lowers\":", "looks like a JSON file"),
            (b"\x1f\x8b\x08", "is compressed with gzip"),
        ] {
            let kind = Foreign::by_start(start).unwrap();
            assert_eq!(kind.to_string(), expected);
        }
        for start in [&b""[..], b"LSMT", b"ZFile\0", b"QFI", b"\0\0\0\0"] {
            assert_eq!(Foreign::by_start(start), None, "{start:?}");
        }
        assert_eq!(
            Foreign::by_end(b"conectix\0\0"),
            Some(Foreign::Image("vhd"))
        );
        assert_eq!(Foreign::by_end(&[0; LOOKED_AT]), None);
    }
}
