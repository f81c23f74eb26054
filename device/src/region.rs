//! The region as vm-memory sees it: guest memory that refuses unplugged blocks.
//!
//! A VMM's other devices reach guest memory through a vm-memory collection. Put a [`MemoryRegion::Device`]
//! into it, and a DMA address in an unplugged block is an error to them, never a crash; and as long as one of
//! them holds a slice of a plugged block, that block cannot be unplugged.
#![expect(
    unsafe_code,
    reason = "a volatile slice is made from the address of a pinned block"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_mem_wire::Geometry;
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::Result;
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion,
    GuestRegionMmap, GuestUsize, MemoryRegionAddress, ReadVolatile, VolatileSlice, WriteVolatile,
};

use crate::access::{BlockAccess, Pin};
use crate::backing::Backing;

/// A region of guest memory: ordinary, or managed by a virtio-mem device.
///
/// `vm_memory::GuestRegionCollection<MemoryRegion>` holds both kinds side by side.
#[derive(Debug)]
pub enum MemoryRegion<B = ()> {
    /// Memory that is always there.
    Ram(GuestRegionMmap<B>),
    /// Memory that comes and goes by blocks.
    Device(DeviceRegion<B>),
}

/// The device-managed region of one device.
#[derive(Debug)]
pub struct DeviceRegion<B = ()> {
    geometry: Geometry,
    backing: Arc<dyn Backing>,
    access: Arc<BlockAccess>,
    bitmap: PinningBitmap<B>,
}

impl<B> DeviceRegion<B> {
    pub(crate) fn new(
        geometry: Geometry,
        backing: Arc<dyn Backing>,
        access: Arc<BlockAccess>,
        bitmap: Arc<B>,
    ) -> Self {
        Self {
            geometry,
            backing,
            access,
            bitmap: PinningBitmap(bitmap),
        }
    }

    /// The dirty bitmap given to [`VirtioMem::region`](crate::VirtioMem::region), for a RAM stream to harvest.
    ///
    /// Besides what the VMM's devices write, each block that was plugged or unplugged is dirty as a whole: a
    /// dirty page of a plugged block is sent, one of an unplugged block is discarded on the other side.
    pub fn dirty_bitmap(&self) -> &B {
        &self.bitmap.0
    }
}

/// A dirty bitmap whose slices keep the blocks they belong to plugged.
///
/// vm-memory hands a bitmap slice along with every volatile slice and with every part split off it, which is
/// just how long a block must stay.
#[derive(Debug)]
pub struct PinningBitmap<B>(Arc<B>);

/// A slice of a [`PinningBitmap`].
#[derive(Clone, Debug)]
pub struct PinningSlice<S> {
    inner: S,
    pin: Option<Arc<Pin>>,
}

impl<'a, B: WithBitmapSlice<'a>> WithBitmapSlice<'a> for PinningBitmap<B> {
    type S = PinningSlice<B::S>;
}

impl<B: Bitmap> Bitmap for PinningBitmap<B> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> BS<'_, Self> {
        PinningSlice {
            inner: self.0.slice_at(offset),
            pin: None,
        }
    }
}

impl<S: BitmapSlice> WithBitmapSlice<'_> for PinningSlice<S> {
    type S = Self;
}

impl<S: BitmapSlice> BitmapSlice for PinningSlice<S> {}

impl<S: BitmapSlice> Bitmap for PinningSlice<S> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.inner.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.inner.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            inner: self.inner.slice_at(offset),
            pin: self.pin.clone(),
        }
    }
}

impl<B: Bitmap> GuestMemoryRegion for MemoryRegion<B> {
    type B = PinningBitmap<B>;

    fn len(&self) -> GuestUsize {
        match self {
            Self::Ram(ram) => ram.len(),
            Self::Device(device) => device.geometry.region_size(),
        }
    }

    fn start_addr(&self) -> GuestAddress {
        match self {
            Self::Ram(ram) => ram.start_addr(),
            Self::Device(device) => GuestAddress(device.geometry.addr()),
        }
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        match self {
            Self::Ram(ram) => PinningSlice {
                inner: ram.bitmap(),
                pin: None,
            },
            Self::Device(device) => device.bitmap.slice_at(0),
        }
    }

    /// Not available in a device region: nothing would keep the block plugged while the pointer is used.
    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8> {
        match self {
            Self::Ram(ram) => ram.get_host_address(addr),
            Self::Device(_) => Err(GuestMemoryError::HostAddressNotAvailable),
        }
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        match self {
            Self::Ram(ram) => ram.file_offset(),
            Self::Device(_) => None,
        }
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>> {
        match self {
            Self::Ram(ram) => {
                let slice = ram.get_slice(offset, count)?;
                let bitmap = PinningSlice {
                    inner: slice.bitmap().clone(),
                    pin: None,
                };
                let at = slice.ptr_guard_mut().as_ptr();
                // SAFETY: the same memory for the same time as `slice`, which borrows from `self`.
                Ok(unsafe { VolatileSlice::with_bitmap(at, slice.len(), bitmap, None) })
            }
            Self::Device(device) => device.get_slice(offset, count),
        }
    }
}

impl<B: Bitmap> DeviceRegion<B> {
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, PinningBitmap<B>>>> {
        let refused = || GuestMemoryError::InvalidBackendAddress;
        let start = usize::try_from(offset.0).map_err(|_| refused())?;
        let addr = self
            .geometry
            .addr()
            .checked_add(offset.0)
            .ok_or_else(refused)?;
        let pin = match count {
            0 if offset.0 <= self.geometry.region_size() => None,
            _ => {
                let blocks = self
                    .geometry
                    .blocks_touching(addr, count as u64)
                    .ok_or_else(refused)?;
                let pin = self.access.pin(blocks);
                Some(Arc::new(pin.ok_or(
                    GuestMemoryError::InvalidGuestAddress(GuestAddress(addr)),
                )?))
            }
        };
        let bitmap = PinningSlice {
            inner: self.bitmap.0.slice_at(start),
            pin,
        };
        let at = self
            .backing
            .host_address()
            .as_ptr()
            .wrapping_byte_add(start);
        // SAFETY: the range lies inside the region (checked above), so inside the backing's mapping, which
        // lives as long as `self`; its blocks are open, and the pin in `bitmap` keeps them so as long as
        // this slice or any part of it is there.
        Ok(unsafe { VolatileSlice::with_bitmap(at, count, bitmap, None) })
    }
}

/// Access by region address. Unlike vm-memory's own implementation this asks for the bytes it needs, not for
/// a slice of the whole region, which is hardly ever plugged as a whole.
impl<B: Bitmap> Bytes<MemoryRegionAddress> for MemoryRegion<B> {
    type E = GuestMemoryError;

    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<usize> {
        Ok(self.get_slice(addr, buf.len())?.write(buf, 0)?)
    }

    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<usize> {
        Ok(self.get_slice(addr, buf.len())?.read(buf, 0)?)
    }

    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(addr, buf.len())?.write_slice(buf, 0)?)
    }

    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(addr, buf.len())?.read_slice(buf, 0)?)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<usize> {
        let slice = self.get_slice(addr, count)?;
        Ok(slice.read_volatile_from(0, src, count)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()> {
        let slice = self.get_slice(addr, count)?;
        Ok(slice.read_exact_volatile_from(0, src, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<usize> {
        let slice = self.get_slice(addr, count)?;
        Ok(slice.write_volatile_to(0, dst, count)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<()> {
        let slice = self.get_slice(addr, count)?;
        Ok(slice.write_all_volatile_to(0, dst, count)?)
    }

    fn store<T: AtomicAccess>(
        &self,
        val: T,
        addr: MemoryRegionAddress,
        order: Ordering,
    ) -> Result<()> {
        Ok(self.get_slice(addr, size_of::<T>())?.store(val, 0, order)?)
    }

    fn load<T: AtomicAccess>(&self, addr: MemoryRegionAddress, order: Ordering) -> Result<T> {
        Ok(self.get_slice(addr, size_of::<T>())?.load(0, order)?)
    }
}
