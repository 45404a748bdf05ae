#include "segment.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace evener {

namespace {

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

template <size_t N>
void put(char (&to)[N], const std::string& text) {
  size_t n = std::min(text.size(), N - 1);
  while (n > 0 && n < text.size() && (text[n] & 0xC0) == 0x80) --n;  // never cut inside a UTF-8 character
  std::memcpy(to, text.data(), n);
  to[n] = 0;
}

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

int64_t cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

Mapping::Mapping(int fd, uint64_t size) : size_(size) {
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) fail("cannot map a shared segment of " + std::to_string(size) + " bytes");
  base_ = static_cast<char*>(p);
}

Mapping::~Mapping() { munmap(base_, size_); }

void Mapping::check(uint64_t offset, uint64_t bytes, uint64_t first_bell, uint64_t bells) const {
  if (offset % kPage || offset < kPage + header().bells * sizeof(Bell) || bytes > size_ || offset > size_ - bytes)
    throw std::invalid_argument("region [" + std::to_string(offset) + ", +" + std::to_string(bytes) +
                                ") does not lie in the segment of " + std::to_string(size_) +
                                " bytes; use the layout that the segment was created with");
  if (first_bell + bells > header().bells)
    throw std::invalid_argument("bells " + std::to_string(first_bell) + ".." + std::to_string(first_bell + bells) +
                                " are beyond the segment's " + std::to_string(header().bells));
}

Aborted Mapping::why() const {
  // The aborter writes a few hundred bytes between 1 and 2; it may have been killed there, so do not wait for long.
  for (int64_t end = now_ns() + 2'000'000; header().abort.load(std::memory_order_acquire) == 1;)
    if (now_ns() > end) return {"unknown", "the replica was stopped; the reason was not recorded"};
  return {header().device, header().reason};
}

bool Mapping::abort(const std::string& device, const std::string& reason) {
  uint32_t running = 0;
  bool first = header().abort.compare_exchange_strong(running, 1);
  if (first) {
    put(header().device, device);
    put(header().reason, reason);
    header().abort.store(2);
  }
  for (uint64_t i = 0; i < header().bells; ++i)
    if (bell(i).awaited.exchange(0)) syscall(SYS_futex, &bell(i).awaited, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  return first;
}

Segment Segment::create(uint64_t size, uint64_t bells) {
  if (size < kPage + bells * sizeof(Bell)) throw std::invalid_argument("segment too small for its bells");
  int fd = memfd_create("evener", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) fail("memfd_create");
  try {
    if (ftruncate(fd, off_t(size)) != 0) fail("cannot size a shared segment to " + std::to_string(size) + " bytes");
    // A fixed size: no process can cut the memory away under another.
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("cannot seal a shared segment");
    auto map = std::make_shared<Mapping>(fd, size);
    map->header().size = size;
    map->header().bells = bells;
    map->header().magic = kMagic;
    return Segment(std::move(map), fd);
  } catch (...) {
    ::close(fd);
    throw;
  }
}

Segment Segment::attach(int fd) {
  struct stat st;
  if (fstat(fd, &st) != 0) fail("descriptor " + std::to_string(fd) + " is no shared segment");
  if (uint64_t(st.st_size) < kPage)
    throw std::invalid_argument("descriptor " + std::to_string(fd) + " is no shared segment of Evener");
  auto map = std::make_shared<Mapping>(fd, uint64_t(st.st_size));
  if (map->header().magic != kMagic || map->header().size != uint64_t(st.st_size))
    throw std::invalid_argument("descriptor " + std::to_string(fd) +
                                " is no shared segment of this version of Evener; start all workers from one build");
  ::close(fd);
  return Segment(std::move(map), -1);
}

std::shared_ptr<Mapping> Segment::map() const {
  if (!map_) throw std::invalid_argument("the segment is closed");
  return map_;
}

void Segment::close() {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  map_.reset();
}

}  // namespace evener
