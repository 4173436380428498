//! Ids of active reads and of their pending subreads.

/// Number of an active read in the read table. It is used again once the read has finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadId(pub u16);

/// A pending subread: its read, and its slot there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubreadId {
    read: ReadId,
    slot: u8,
}

impl SubreadId {
    /// Width of an id in [`SubreadId::to_bits`].
    pub const BITS: u32 = 24;

    /// Id of the subread in slot `slot` of `read`.
    pub fn new(read: ReadId, slot: u8) -> Self {
        Self { read, slot }
    }

    /// The read.
    pub fn read(self) -> ReadId {
        self.read
    }

    /// The subread's slot in its read.
    pub fn slot(self) -> u8 {
        self.slot
    }

    /// The id as a number, which the ring and the fetcher return with a result.
    pub fn to_bits(self) -> u32 {
        u32::from(self.read.0) << 8 | u32::from(self.slot)
    }

    /// The id of a number. Bits above [`SubreadId::BITS`] are ignored.
    pub fn from_bits(bits: u32) -> Self {
        let [slot, low, high, _] = bits.to_le_bytes();
        Self {
            read: ReadId(u16::from_le_bytes([low, high])),
            slot,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_the_way_through_a_number() {
        for (read, slot) in [(0, 0), (0x1234, 15), (u16::MAX, u8::MAX)] {
            let id = SubreadId::new(ReadId(read), slot);
            let bits = id.to_bits();
            assert!(bits < 1 << SubreadId::BITS);
            assert_eq!(SubreadId::from_bits(bits), id);
            assert_eq!(SubreadId::from_bits(bits | 0xff << SubreadId::BITS), id);
        }
    }
}
