// libnvidia-ml.so.1 stand-in for tests on hosts with no GPU.
//
// Own code: no NVIDIA source or header is used. It answers the NVML calls that
// pynvml, go-nvml and exporters make, from defaults (8 x A100-SXM4-80GB) and
// from an optional text file, MOCK_NVML_CONFIG or /etc/mock-nvml.conf. It is read again
// whenever it changes, so a test can inject a fault into a running reader.
//
//   # key = value sets a key for all GPUs, N.key = value for GPU N only
//   count = 8
//   driver_version = 535.261.03
//   temp_c = 34
//   3.temp_c = 92
//   5.lost = 1
//   6.xid = 48
//   6.xid_times = 1000       the event is told so often
//   fails = 999              every call fails with this code
//   hang_ms = 60000          every call takes so long, as with a driver that hangs
//   2.procs = 4242:30720,4243:1024      MIG does not change then
//   2.ecc_mode = -1          this GPU has no ECC; likewise mig_mode
//   mig_waits = 1            a change of MIG's mode waits for a reset, as that of ECC always does
//   2.mig_fails = 1          no MIG instance can be made
//
// What a setter sets is kept in a file beside it, whose name ends in .set, and outlasts a new
// configuration, as it outlasts a fault in a GPU. NVML asks for root; this file for the right to write there.
//
// Environment: MOCK_NVML_CONFIG, MOCK_NVML_NUM_DEVICES (beats count).
#include <ctype.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>

#define API __attribute__((visibility("default")))
#define MAXDEV 16
#define MIB 1048576ULL

enum {
	OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
	NO_PERMISSION = 4, TOO_SMALL = 7, TIMEOUT = 10, GPU_LOST = 15, RESET_REQUIRED = 16, IN_USE = 19,
	NO_RESOURCES = 23, VERSION_MISMATCH = 25,
};

// Integer state of one GPU: name, default.
#define INTS(X) \
	X(mem_total_mib, 81920) X(mem_used_mib, 4) X(mem_reserved_mib, 0) \
	X(util_gpu, 0) X(util_mem, 0) X(util_enc, 0) X(util_dec, 0) \
	X(temp_c, 34) X(mem_temp_c, 38) X(temp_slowdown_c, 89) X(temp_shutdown_c, 92) \
	X(temp_max_c, 85) X(temp_mem_max_c, 95) \
	X(power_mw, 62000) X(limit_mw, 400000) X(limit_min_mw, 100000) X(limit_max_mw, 400000) \
	X(energy_mj, 1000000) X(sm_mhz, 210) X(sm_max_mhz, 1410) X(mem_mhz, 1593) \
	X(mem_max_mhz, 1593) X(pstate, 0) X(throttle, 1) X(persistence, 1) \
	X(compute_mode, 0) X(ecc_mode, 1) X(ecc_corr, 0) X(ecc_uncorr, 0) \
	X(ecc_corr_agg, 0) X(ecc_uncorr_agg, 0) X(retired_sbe, 0) X(retired_dbe, 0) \
	X(retired_pending, 0) X(remap_corr, 0) X(remap_uncorr, 0) X(remap_pending, 0) \
	X(remap_failure, 0) X(mig_mode, 0) X(nvlink_count, 12) X(nvlink_down, 0) \
	X(nvlink_mbps, 25000) X(nvlink_crc, 0) X(nvlink_replay, 0) X(nvlink_recovery, 0) \
	X(pcie_gen, 4) X(pcie_gen_max, 4) X(pcie_width, 16) X(pcie_width_max, 16) \
	X(pcie_tx_kib, 0) X(pcie_rx_kib, 0) X(pcie_replay, 0) X(pci_id, 0x20b210de) \
	X(pci_subsys, 0x146310de) X(bar1_total_mib, 131072) X(bar1_used_mib, 1) \
	X(cc_major, 8) X(cc_minor, 0) X(arch, 7) X(cores, 6912) X(bus_width, 5120) \
	X(numa, -1) X(xid, 0) X(xid_times, 1) X(lost, 0) \
	X(ecc_pending, -1) X(mig_pending, -1) X(mig_waits, 0) X(mig_fails, 0)

// Text state of one GPU: name, size.
#define STRS(X) X(name, 96) X(uuid, 80) X(serial, 32) X(bus_id, 32) X(vbios, 32) \
	X(inforom, 16) X(part_number, 32) X(procs, 512) X(mig, 256)

struct dev {
#define F(n, d) long long n;
	INTS(F)
#undef F
#define F(n, s) char n[s];
	STRS(F)
#undef F
	long long xid_told, xid_left;
};

static struct {
	int count, cuda, hang_ms, fails;
	char driver[80], nvml[80];
	struct dev d[MAXDEV];
} S;

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static int refs, loaded;
static struct timespec seen;
static off_t seen_size = -1;
static struct timespec kept_seen;
static off_t kept_size = -1;

static const unsigned char buses[MAXDEV] = {0x07, 0x0f, 0x47, 0x4e, 0x87, 0x90, 0xb7, 0xbd,
	0xc1, 0xc5, 0xc9, 0xcd, 0xd1, 0xd5, 0xd9, 0xdd};

static void set(struct dev *d, const char *k, const char *v) {
#define F(n, def) if (!strcmp(k, #n)) { d->n = strtoll(v, NULL, 0); return; }
	INTS(F)
#undef F
#define F(n, s) if (!strcmp(k, #n)) { snprintf(d->n, s, "%s", v); return; }
	STRS(F)
#undef F
	fprintf(stderr, "mocknvml: unknown key '%s'\n", k);
}

static void defaults(void) {
	S.count = 8;
	S.cuda = 12020;
	S.hang_ms = S.fails = 0;
	strcpy(S.driver, "535.261.03");
	strcpy(S.nvml, "12.535.261.03");
	for (int i = 0; i < MAXDEV; i++) {
		struct dev *d = &S.d[i];
		long long told = d->xid_told, left = d->xid_left;
		memset(d, 0, sizeof *d);
		d->xid_told = told;
		d->xid_left = left;
#define F(n, def) d->n = def;
		INTS(F)
#undef F
		strcpy(d->name, "NVIDIA A100-SXM4-80GB");
		snprintf(d->uuid, sizeof d->uuid, "GPU-4d4f434b-0000-4000-8000-%012x", i);
		snprintf(d->serial, sizeof d->serial, "13200000000%02d", i);
		snprintf(d->bus_id, sizeof d->bus_id, "00000000:%02X:00.0", buses[i]);
		strcpy(d->vbios, "92.00.45.00.05");
		strcpy(d->inforom, "G506.0210.00.04");
		strcpy(d->part_number, "692-2G506-0212-002");
	}
}

static char *trim(char *s) {
	while (isspace((unsigned char)*s)) s++;
	char *e = s + strlen(s);
	while (e > s && isspace((unsigned char)e[-1])) *--e = 0;
	return s;
}

// Two passes, so that N.key beats key wherever it stands in the file.
static void parse(FILE *f) {
	char line[1024];
	for (int pass = 0; pass < 2; pass++) {
		rewind(f);
		while (fgets(line, sizeof line, f)) {
			char *k = trim(line), *v = strchr(k, '=');
			if (*k == '#' || !*k) continue;
			if (!v) { if (pass == 0) fprintf(stderr, "mocknvml: no '=' in '%s'\n", k); continue; }
			*v++ = 0;
			k = trim(k);
			v = trim(v);
			char *dot = NULL;
			long n = strtol(k, &dot, 10);
			if (dot != k && *dot == '.') {
				if (pass == 1 && n >= 0 && n < MAXDEV) set(&S.d[n], dot + 1, v);
				continue;
			}
			if (pass == 1) continue;
			if (!strcmp(k, "count")) S.count = atoi(v);
			else if (!strcmp(k, "cuda_version")) S.cuda = atoi(v);
			else if (!strcmp(k, "fails")) S.fails = atoi(v);
			else if (!strcmp(k, "hang_ms")) S.hang_ms = atoi(v);
			else if (!strcmp(k, "driver_version")) snprintf(S.driver, sizeof S.driver, "%s", v);
			else if (!strcmp(k, "nvml_version")) snprintf(S.nvml, sizeof S.nvml, "%s", v);
			else for (int i = 0; i < MAXDEV; i++) set(&S.d[i], k, v);
		}
	}
}

static const char *config(void) {
	const char *path = getenv("MOCK_NVML_CONFIG");
	return path ? path : "/etc/mock-nvml.conf";
}

// The file of setters.
static const char *kept(char *out, size_t size) {
	snprintf(out, size, "%s.set", config());
	return out;
}

static int changed(const char *path, struct timespec *at, off_t *size, int *have) {
	struct stat st;
	*have = *path && stat(path, &st) == 0;
	if (!*have || (st.st_size == *size && st.st_mtim.tv_sec == at->tv_sec && st.st_mtim.tv_nsec == at->tv_nsec)) return 0;
	*at = st.st_mtim;
	*size = st.st_size;
	return 1;
}

static void parse_file(const char *path) {
	FILE *f = fopen(path, "r");
	if (f) { parse(f); fclose(f); }
}

static void refresh(void) {
	char path[512];
	const char *n = getenv("MOCK_NVML_NUM_DEVICES");
	int have, have_kept;
	pthread_mutex_lock(&mu);
	int news = changed(config(), &seen, &seen_size, &have);
	news |= changed(kept(path, sizeof path), &kept_seen, &kept_size, &have_kept);
	if (!loaded || news) {
		defaults();
		if (have) parse_file(config());
		if (have_kept) parse_file(path);
		if (n && *n) S.count = atoi(n);
		if (S.count < 0) S.count = 0;
		if (S.count > MAXDEV) S.count = MAXDEV;
		loaded = 1;
	}
	int hang = S.hang_ms;
	pthread_mutex_unlock(&mu);
	if (hang) nanosleep(&(struct timespec){hang / 1000, hang % 1000 * 1000000L}, NULL);
}

// Checks a handle; says "lost" for a GPU that fell off the bus.
static int get(void *h, struct dev **d) {
	if (!refs) return UNINITIALIZED;
	refresh();
	if (S.fails) return S.fails;
	*d = h;
	if (*d < S.d || *d >= S.d + S.count) return INVALID;
	return (*d)->lost ? GPU_LOST : OK;
}
#define DEV struct dev *d; do { int r_ = get(h, &d); if (r_) return r_; } while (0)
#define NEED(p) do { if (!(p)) return INVALID; } while (0)

static int put(char *out, unsigned len, const char *s) {
	NEED(out);
	if (strlen(s) + 1 > len) return TOO_SMALL;
	strcpy(out, s);
	return OK;
}

// ---- library and system
API int nvmlInit_v2(void) { pthread_mutex_lock(&mu); refs++; pthread_mutex_unlock(&mu); refresh(); return OK; }
API int nvmlInit(void) { return nvmlInit_v2(); }
API int nvmlInitWithFlags(unsigned f) { (void)f; return nvmlInit_v2(); }
API int nvmlShutdown(void) {
	int r = OK;
	pthread_mutex_lock(&mu);
	if (refs) refs--; else r = UNINITIALIZED;
	pthread_mutex_unlock(&mu);
	return r;
}
API const char *nvmlErrorString(int r) {
	switch (r) {
	case OK: return "Success";
	case UNINITIALIZED: return "Uninitialized";
	case INVALID: return "Invalid Argument";
	case NOT_SUPPORTED: return "Not Supported";
	case NOT_FOUND: return "Not Found";
	case TOO_SMALL: return "Insufficient Size";
	case TIMEOUT: return "Timeout";
	case GPU_LOST: return "GPU is lost";
	case NO_PERMISSION: return "Insufficient Permissions";
	case RESET_REQUIRED: return "GPU requires reset";
	case IN_USE: return "In use by another client";
	case NO_RESOURCES: return "Insufficient Resources";
	case VERSION_MISMATCH: return "Argument version mismatch";
	case 13: return "Function Not Found";
	}
	return "Unknown Error";
}
#define SYS do { if (!refs) return UNINITIALIZED; refresh(); if (S.fails) return S.fails; } while (0)
API int nvmlSystemGetDriverVersion(char *o, unsigned n) { SYS; return put(o, n, S.driver); }
API int nvmlSystemGetNVMLVersion(char *o, unsigned n) { refresh(); return put(o, n, S.nvml); }
API int nvmlSystemGetCudaDriverVersion(int *v) { refresh(); NEED(v); *v = S.cuda; return OK; }
API int nvmlSystemGetCudaDriverVersion_v2(int *v) { return nvmlSystemGetCudaDriverVersion(v); }
API int nvmlSystemGetProcessName(unsigned pid, char *o, unsigned n) {
	SYS;
	NEED(o);
	char p[64], b[256];
	snprintf(p, sizeof p, "/proc/%u/comm", pid);
	FILE *f = fopen(p, "r");
	if (!f) return put(o, n, "mock-process");
	if (!fgets(b, sizeof b, f)) b[0] = 0;
	fclose(f);
	return put(o, n, trim(b));
}
API int nvmlUnitGetCount(unsigned *n) { SYS; NEED(n); *n = 0; return OK; }
API int nvmlGetExcludedDeviceCount(unsigned *n) { NEED(n); *n = 0; return OK; }
API int nvmlInternalGetExportTable(const void **t, const void *id) { (void)id; if (t) *t = NULL; return NOT_FOUND; }

// ---- finding GPUs
API int nvmlDeviceGetCount_v2(unsigned *n) { SYS; NEED(n); *n = S.count; return OK; }
API int nvmlDeviceGetCount(unsigned *n) { return nvmlDeviceGetCount_v2(n); }
API int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) {
	SYS;
	NEED(h);
	if (i >= (unsigned)S.count) return INVALID;
	if (S.d[i].lost) return GPU_LOST;
	*h = &S.d[i];
	return OK;
}
API int nvmlDeviceGetHandleByIndex(unsigned i, void **h) { return nvmlDeviceGetHandleByIndex_v2(i, h); }
static int find(const char *s, void **h, size_t off, int tail) {
	SYS;
	NEED(s && h);
	for (int i = 0; i < S.count; i++) {
		const char *have = (const char *)&S.d[i] + off, *want = s;
		if (tail) { // PCI: compare without the domain's width
			have = strchr(have, ':');
			want = strchr(s, ':');
			if (!have || !want) continue;
			if (!strchr(want + 1, ':')) want = s - 1; // no domain given: "07:00.0"
			if (strcasecmp(have + 1, want + 1)) continue;
		} else if (strcmp(have, want)) continue;
		if (S.d[i].lost) return GPU_LOST;
		*h = &S.d[i];
		return OK;
	}
	return NOT_FOUND;
}
API int nvmlDeviceGetHandleByUUID(const char *s, void **h) { return find(s, h, offsetof(struct dev, uuid), 0); }
API int nvmlDeviceGetHandleBySerial(const char *s, void **h) { return find(s, h, offsetof(struct dev, serial), 0); }
API int nvmlDeviceGetHandleByPciBusId_v2(const char *s, void **h) { return find(s, h, offsetof(struct dev, bus_id), 1); }
API int nvmlDeviceGetHandleByPciBusId(const char *s, void **h) { return nvmlDeviceGetHandleByPciBusId_v2(s, h); }

// ---- text
#define TXT(fn, expr) API int fn(void *h, char *o, unsigned n) { DEV; return put(o, n, expr); }
TXT(nvmlDeviceGetUUID, d->uuid)
TXT(nvmlDeviceGetSerial, d->serial)
TXT(nvmlDeviceGetVbiosVersion, d->vbios)
TXT(nvmlDeviceGetInforomImageVersion, d->inforom)
TXT(nvmlDeviceGetBoardPartNumber, d->part_number)
API int nvmlDeviceGetInforomVersion(void *h, int o, char *s, unsigned n) { DEV; (void)o; return put(s, n, "2.0"); }
API int nvmlDeviceGetGspFirmwareVersion(void *h, char *s) { DEV; return put(s, 64, S.driver); }
API int nvmlDeviceGetGspFirmwareMode(void *h, unsigned *e, unsigned *def) { DEV; NEED(e && def); *e = 1; *def = 1; return OK; }

// ---- one number
#define NUM(fn, expr) API int fn(void *h, unsigned *v) { DEV; NEED(v); *v = (unsigned)(expr); return OK; }
NUM(nvmlDeviceGetIndex, d - S.d)
NUM(nvmlDeviceGetMinorNumber, d - S.d)
NUM(nvmlDeviceGetModuleId, d - S.d)
NUM(nvmlDeviceGetBoardId, buses[d - S.d] << 8)
NUM(nvmlDeviceGetMultiGpuBoard, 0)
NUM(nvmlDeviceGetBrand, 14)
NUM(nvmlDeviceGetArchitecture, d->arch)
NUM(nvmlDeviceGetNumGpuCores, d->cores)
NUM(nvmlDeviceGetMemoryBusWidth, d->bus_width)
NUM(nvmlDeviceGetPersistenceMode, d->persistence)
NUM(nvmlDeviceGetComputeMode, d->compute_mode)
NUM(nvmlDeviceGetDisplayMode, 0)
NUM(nvmlDeviceGetDisplayActive, 0)
NUM(nvmlDeviceGetPerformanceState, d->pstate)
NUM(nvmlDeviceGetPowerState, d->pstate)
NUM(nvmlDeviceGetPowerUsage, d->power_mw)
NUM(nvmlDeviceGetPowerManagementMode, 1)
NUM(nvmlDeviceGetPowerManagementLimit, d->limit_mw)
NUM(nvmlDeviceGetPowerManagementDefaultLimit, d->limit_max_mw)
NUM(nvmlDeviceGetEnforcedPowerLimit, d->limit_mw)
NUM(nvmlDeviceGetCurrPcieLinkGeneration, d->pcie_gen)
NUM(nvmlDeviceGetMaxPcieLinkGeneration, d->pcie_gen_max)
NUM(nvmlDeviceGetGpuMaxPcieLinkGeneration, d->pcie_gen_max)
NUM(nvmlDeviceGetCurrPcieLinkWidth, d->pcie_width)
NUM(nvmlDeviceGetMaxPcieLinkWidth, d->pcie_width_max)
NUM(nvmlDeviceGetPcieReplayCounter, d->pcie_replay)
NUM(nvmlDeviceGetRetiredPagesPendingStatus, d->retired_pending)
NUM(nvmlDeviceIsMigDeviceHandle, 0)
NUM(nvmlDeviceGetNumFans, 0)
API int nvmlDeviceGetMaxMigDeviceCount(void *h, unsigned *v) { DEV; NEED(v); *v = d->mig_mode >= 0 ? 7 : 0; return OK; }
API int nvmlDeviceGetFanSpeed(void *h, unsigned *v) { DEV; (void)v; return NOT_SUPPORTED; }
API int nvmlDeviceGetVirtualizationMode(void *h, unsigned *v) { DEV; NEED(v); *v = 0; return OK; }
API int nvmlDeviceGetNumaNodeId(void *h, unsigned *v) { DEV; NEED(v); if (d->numa < 0) return NOT_SUPPORTED; *v = d->numa; return OK; }

#define BIG(fn, expr) API int fn(void *h, unsigned long long *v) { DEV; NEED(v); *v = (unsigned long long)(expr); return OK; }
BIG(nvmlDeviceGetTotalEnergyConsumption, d->energy_mj)
BIG(nvmlDeviceGetCurrentClocksThrottleReasons, d->throttle)
BIG(nvmlDeviceGetCurrentClocksEventReasons, d->throttle)
BIG(nvmlDeviceGetSupportedClocksThrottleReasons, 0x1ff)
BIG(nvmlDeviceGetSupportedClocksEventReasons, 0x1ff)
BIG(nvmlDeviceGetSupportedEventTypes, 0x1b)

// ---- two numbers
#define PAIR(fn, a_, b_) API int fn(void *h, unsigned *a, unsigned *b) { DEV; NEED(a && b); *a = (unsigned)(a_); *b = (unsigned)(b_); return OK; }
PAIR(nvmlDeviceGetPowerManagementLimitConstraints, d->limit_min_mw, d->limit_max_mw)
#define MODE(fn, now, next) API int fn(void *h, unsigned *a, unsigned *b) { \
	DEV; NEED(a && b); if (now < 0) return NOT_SUPPORTED; *a = (unsigned)now; *b = (unsigned)(next < 0 ? now : next); return OK; }
MODE(nvmlDeviceGetEccMode, d->ecc_mode, d->ecc_pending)
MODE(nvmlDeviceGetMigMode, d->mig_mode, d->mig_pending)
PAIR(nvmlDeviceGetEncoderUtilization, d->util_enc, 167000)
PAIR(nvmlDeviceGetDecoderUtilization, d->util_dec, 167000)
PAIR(nvmlDeviceGetJpgUtilization, 0, 167000)
PAIR(nvmlDeviceGetOfaUtilization, 0, 167000)
PAIR(nvmlDeviceGetCudaComputeCapability, d->cc_major, d->cc_minor)

struct util { unsigned gpu, mem; };
API int nvmlDeviceGetUtilizationRates(void *h, struct util *u) { DEV; NEED(u); u->gpu = d->util_gpu; u->mem = d->util_mem; return OK; }

// ---- memory
struct mem1 { unsigned long long total, free, used; };
struct mem2 { unsigned version; unsigned long long total, reserved, free, used; };
API int nvmlDeviceGetMemoryInfo(void *h, struct mem1 *m) {
	DEV; NEED(m);
	m->total = d->mem_total_mib * MIB;
	m->used = (d->mem_used_mib + d->mem_reserved_mib) * MIB;
	m->free = m->total - m->used;
	return OK;
}
API int nvmlDeviceGetMemoryInfo_v2(void *h, struct mem2 *m) {
	DEV; NEED(m);
	if (m->version != (sizeof *m | 2u << 24)) return VERSION_MISMATCH;
	m->total = d->mem_total_mib * MIB;
	m->reserved = d->mem_reserved_mib * MIB;
	m->used = d->mem_used_mib * MIB;
	m->free = m->total - m->used - m->reserved;
	return OK;
}
API int nvmlDeviceGetBAR1MemoryInfo(void *h, struct mem1 *m) {
	DEV; NEED(m);
	m->total = d->bar1_total_mib * MIB;
	m->used = d->bar1_used_mib * MIB;
	unsigned long long fr = m->total - m->used;
	m->free = fr; // order in NVML: total, free, used
	return OK;
}

// ---- heat and clocks
API int nvmlDeviceGetTemperature(void *h, unsigned sensor, unsigned *v) { DEV; NEED(v && sensor == 0); *v = d->temp_c; return OK; }
struct temp1 { unsigned version, sensor; int c; };
API int nvmlDeviceGetTemperatureV(void *h, struct temp1 *t) {
	DEV; NEED(t);
	if (t->version != (sizeof *t | 1u << 24)) return VERSION_MISMATCH;
	if (t->sensor) return INVALID;
	t->c = d->temp_c;
	return OK;
}
API int nvmlDeviceGetTemperatureThreshold(void *h, unsigned which, unsigned *v) {
	DEV; NEED(v);
	switch (which) {
	case 0: *v = d->temp_shutdown_c; return OK;
	case 1: *v = d->temp_slowdown_c; return OK;
	case 2: *v = d->temp_mem_max_c; return OK;
	case 3: *v = d->temp_max_c; return OK;
	}
	return which < 8 ? NOT_SUPPORTED : INVALID;
}
static int clk(struct dev *d, unsigned type, unsigned *v, int max) {
	NEED(v && type < 4);
	if (type == 2) *v = max ? d->mem_max_mhz : d->mem_mhz;
	else *v = max ? d->sm_max_mhz : d->sm_mhz;
	return OK;
}
API int nvmlDeviceGetClockInfo(void *h, unsigned t, unsigned *v) { DEV; return clk(d, t, v, 0); }
API int nvmlDeviceGetMaxClockInfo(void *h, unsigned t, unsigned *v) { DEV; return clk(d, t, v, 1); }
API int nvmlDeviceGetApplicationsClock(void *h, unsigned t, unsigned *v) { DEV; return clk(d, t, v, 1); }
API int nvmlDeviceGetDefaultApplicationsClock(void *h, unsigned t, unsigned *v) { DEV; return clk(d, t, v, 1); }
API int nvmlDeviceGetMaxCustomerBoostClock(void *h, unsigned t, unsigned *v) { DEV; return clk(d, t, v, 1); }
API int nvmlDeviceGetClock(void *h, unsigned t, unsigned id, unsigned *v) { DEV; return clk(d, t, v, id != 0); }
struct violation { unsigned long long ref, ns; };
API int nvmlDeviceGetViolationStatus(void *h, unsigned p, struct violation *v) {
	DEV; NEED(v); (void)p;
	v->ref = (unsigned long long)time(NULL) * 1000000ULL; v->ns = 0;
	return OK;
}

// ---- PCI and topology
struct pci2 { char bus_id[16]; unsigned domain, bus, device, id, subsys, r0, r1, r2, r3; };
struct pci3 { char legacy[16]; unsigned domain, bus, device, id, subsys; char bus_id[32]; };
static void fill_pci(struct dev *d, struct pci3 *p) {
	memset(p, 0, sizeof *p);
	sscanf(d->bus_id, "%x:%x:%x", &p->domain, &p->bus, &p->device);
	snprintf(p->legacy, sizeof p->legacy, "%04X:%02X:%02X.0", p->domain & 0xffff, p->bus & 0xff, p->device & 0xff);
	snprintf(p->bus_id, sizeof p->bus_id, "%08X:%02X:%02X.0", p->domain, p->bus & 0xff, p->device & 0xff);
	p->id = d->pci_id;
	p->subsys = d->pci_subsys;
}
API int nvmlDeviceGetPciInfo_v3(void *h, struct pci3 *p) { DEV; NEED(p); fill_pci(d, p); return OK; }
API int nvmlDeviceGetPciInfo_v2(void *h, struct pci2 *p) {
	DEV; NEED(p);
	struct pci3 q;
	fill_pci(d, &q);
	memset(p, 0, sizeof *p);
	memcpy(p, &q, offsetof(struct pci3, bus_id));
	return OK;
}
API int nvmlDeviceGetPciInfo(void *h, struct pci2 *p) { return nvmlDeviceGetPciInfo_v2(h, p); }
API int nvmlDeviceGetPcieThroughput(void *h, unsigned dir, unsigned *v) { DEV; NEED(v); *v = dir ? d->pcie_rx_kib : d->pcie_tx_kib; return OK; }
API int nvmlDeviceGetTopologyCommonAncestor(void *h, void *h2, unsigned *level) {
	DEV; NEED(level);
	struct dev *e;
	int r = get(h2, &e);
	if (r) return r;
	long a = d - S.d, b = e - S.d;
	*level = a == b ? 0 : a / 2 == b / 2 ? 10 : a / 4 == b / 4 ? 40 : 50;
	return OK;
}
API int nvmlDeviceGetP2PStatus(void *h, void *h2, unsigned idx, unsigned *st) {
	DEV; NEED(st && idx < 5);
	struct dev *e;
	int r = get(h2, &e);
	if (r) return r;
	*st = d == e || (idx == 2 && !(d->nvlink_count && e->nvlink_count)) ? 5 : 0;
	return OK;
}
static int cpus(unsigned n, unsigned long *set_) {
	NEED(set_ && n);
	memset(set_, 0, n * sizeof *set_);
	set_[0] = 3;
	return OK;
}
API int nvmlDeviceGetCpuAffinity(void *h, unsigned n, unsigned long *s) { DEV; return cpus(n, s); }
API int nvmlDeviceGetMemoryAffinity(void *h, unsigned n, unsigned long *s, unsigned scope) { DEV; (void)scope; int r = cpus(n, s); if (!r) s[0] = 1; return r; }

// ---- ECC and page health
static long long ecc(struct dev *d, unsigned type, unsigned counter) {
	if (counter == 0) return type ? d->ecc_uncorr : d->ecc_corr;
	return type ? d->ecc_uncorr + d->ecc_uncorr_agg : d->ecc_corr + d->ecc_corr_agg;
}
API int nvmlDeviceGetTotalEccErrors(void *h, unsigned type, unsigned counter, unsigned long long *v) {
	DEV; NEED(v && type < 2 && counter < 2);
	if (!d->ecc_mode) return NOT_SUPPORTED;
	*v = ecc(d, type, counter);
	return OK;
}
API int nvmlDeviceGetMemoryErrorCounter(void *h, unsigned type, unsigned counter, unsigned loc, unsigned long long *v) {
	DEV; NEED(v && type < 2 && counter < 2 && loc < 8);
	if (!d->ecc_mode || loc == 4 || loc == 5) return NOT_SUPPORTED;
	*v = loc == 2 ? ecc(d, type, counter) : 0; // all errors are put down to DRAM
	return OK;
}
struct detail { unsigned long long l1, l2, dram, regs; };
API int nvmlDeviceGetDetailedEccErrors(void *h, unsigned type, unsigned counter, struct detail *v) {
	DEV; NEED(v && type < 2 && counter < 2);
	if (!d->ecc_mode) return NOT_SUPPORTED;
	memset(v, 0, sizeof *v);
	v->dram = ecc(d, type, counter);
	return OK;
}
API int nvmlDeviceGetRetiredPages(void *h, unsigned cause, unsigned *n, unsigned long long *a) {
	DEV; NEED(n);
	unsigned have = cause == 0 ? d->retired_sbe : d->retired_dbe, room = *n;
	*n = have;
	if (room < have || (have && !a)) return TOO_SMALL;
	for (unsigned i = 0; i < have; i++) a[i] = 0x10000ULL * (i + 1);
	return OK;
}
API int nvmlDeviceGetRetiredPages_v2(void *h, unsigned cause, unsigned *n, unsigned long long *a, unsigned long long *ts) {
	int r = nvmlDeviceGetRetiredPages(h, cause, n, a);
	if (r == OK && ts) for (unsigned i = 0; i < *n; i++) ts[i] = 0;
	return r;
}
API int nvmlDeviceGetRemappedRows(void *h, unsigned *c, unsigned *u, unsigned *p, unsigned *f) {
	DEV; NEED(c && u && p && f);
	*c = d->remap_corr; *u = d->remap_uncorr; *p = d->remap_pending != 0; *f = d->remap_failure != 0;
	return OK;
}
struct histogram { unsigned max, high, partial, low, none; };
API int nvmlDeviceGetRowRemapperHistogram(void *h, struct histogram *v) {
	DEV; NEED(v);
	memset(v, 0, sizeof *v);
	v->max = 640 - (d->remap_corr + d->remap_uncorr);
	v->high = d->remap_corr + d->remap_uncorr;
	return OK;
}

// ---- NVLink: all-to-all through switches, as on an HGX board
#define LINK DEV; NEED(link < 18); if (link >= (unsigned)d->nvlink_count) return NOT_SUPPORTED
API int nvmlDeviceGetNvLinkState(void *h, unsigned link, unsigned *v) { LINK; NEED(v); *v = !(d->nvlink_down >> link & 1); return OK; }
API int nvmlDeviceGetNvLinkVersion(void *h, unsigned link, unsigned *v) { LINK; NEED(v); *v = 4; return OK; }
API int nvmlDeviceGetNvLinkCapability(void *h, unsigned link, unsigned cap, unsigned *v) { LINK; NEED(v && cap < 6); *v = cap != 4; return OK; }
API int nvmlDeviceGetNvLinkErrorCounter(void *h, unsigned link, unsigned c, unsigned long long *v) {
	LINK; NEED(v && c < 5);
	*v = link ? 0 : c == 0 ? d->nvlink_replay : c == 1 ? d->nvlink_recovery : c == 2 ? d->nvlink_crc : 0;
	return OK;
}
API int nvmlDeviceGetNvLinkRemoteDeviceType(void *h, unsigned link, unsigned *v) { LINK; NEED(v); *v = 2; return OK; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *h, unsigned link, struct pci3 *p) {
	LINK; NEED(p);
	memset(p, 0, sizeof *p);
	p->bus = 0xc4 + link / 2;
	p->id = 0x1af110de;
	snprintf(p->legacy, sizeof p->legacy, "0000:%02X:00.0", p->bus);
	snprintf(p->bus_id, sizeof p->bus_id, "00000000:%02X:00.0", p->bus);
	return OK;
}

// ---- processes
struct proc1 { unsigned pid; unsigned long long mem; };
struct proc2 { unsigned pid; unsigned long long mem; unsigned gi, ci; };
static int procs(void *h, unsigned *n, void *out, int v) {
	DEV; NEED(n);
	unsigned room = *n, have = 0;
	for (const char *s = d->procs; *s;) {
		char *e;
		unsigned pid = strtoul(s, &e, 10);
		unsigned long long m = *e == ':' ? strtoull(e + 1, &e, 10) * MIB : 0;
		if (e == s) break;
		if (have < room && out) {
			if (v == 1) ((struct proc1 *)out)[have] = (struct proc1){pid, m};
			else ((struct proc2 *)out)[have] = (struct proc2){pid, m, ~0u, ~0u};
		}
		have++;
		s = *e == ',' ? e + 1 : e;
	}
	*n = have;
	return have > room ? TOO_SMALL : OK;
}
API int nvmlDeviceGetComputeRunningProcesses(void *h, unsigned *n, void *p) { return procs(h, n, p, 1); }
API int nvmlDeviceGetComputeRunningProcesses_v2(void *h, unsigned *n, void *p) { return procs(h, n, p, 2); }
API int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *n, void *p) { return procs(h, n, p, 2); }
static int none(void *h, unsigned *n) { DEV; NEED(n); *n = 0; return OK; }
#define NONE(fn) API int fn(void *h, unsigned *n, void *p) { (void)p; return none(h, n); }
NONE(nvmlDeviceGetGraphicsRunningProcesses)
NONE(nvmlDeviceGetGraphicsRunningProcesses_v2)
NONE(nvmlDeviceGetGraphicsRunningProcesses_v3)
NONE(nvmlDeviceGetMPSComputeRunningProcesses_v3)

// ---- field values
struct field { uint32_t id, scope; int64_t ts, latency; int type, ret; union { double d; uint32_t u; uint64_t ull; int i; } v; };
API int nvmlDeviceGetFieldValues(void *h, int n, struct field *f) {
	DEV; NEED(f && n > 0);
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	for (int i = 0; i < n; i++) {
		f[i].ts = now.tv_sec * 1000000LL + now.tv_nsec / 1000;
		f[i].latency = 0;
		f[i].type = 3; // unsigned long long
		f[i].ret = OK;
		f[i].v.ull = 0;
		long long x;
		unsigned id = f[i].id;
		switch (id) {
		case 1: case 2: x = d->ecc_mode; f[i].type = 1; break;
		case 3: x = ecc(d, 0, 0); break;
		case 4: x = ecc(d, 1, 0); break;
		case 5: x = ecc(d, 0, 1); break;
		case 6: x = ecc(d, 1, 1); break;
		case 29: x = d->retired_sbe; break;
		case 30: x = d->retired_dbe; break;
		case 31: x = d->retired_pending; f[i].type = 1; break;
		case 38: x = d->nvlink_crc; break;
		case 45: x = 0; break;
		case 52: x = d->nvlink_replay; break;
		case 59: x = d->nvlink_recovery; break;
		case 82: x = d->mem_temp_c; f[i].type = 1; break;
		case 83: x = d->energy_mj; break;
		case 90: x = d->nvlink_mbps; f[i].type = 1; break;
		case 91: x = d->nvlink_count; f[i].type = 1; break;
		case 94: x = d->pcie_replay; break;
		case 138: case 139: x = 0; break;
		case 142: x = d->remap_corr; f[i].type = 1; break;
		case 143: x = d->remap_uncorr; f[i].type = 1; break;
		case 144: x = d->remap_pending != 0; f[i].type = 1; break;
		case 145: x = d->remap_failure != 0; f[i].type = 1; break;
		case 185: case 186: x = d->power_mw; f[i].type = 1; break;
		case 190: x = d->limit_mw; f[i].type = 1; break;
		default:
			if ((id >= 84 && id <= 89) || (id >= 132 && id <= 137)) { // link speeds 0..11
				unsigned l = id < 90 ? id - 84 : id - 126;
				x = l < (unsigned)d->nvlink_count && !(d->nvlink_down >> l & 1) ? d->nvlink_mbps : 0;
				f[i].type = 1;
				break;
			}
			f[i].ret = NOT_SUPPORTED;
			continue;
		}
		if (f[i].type == 1) f[i].v.u = (uint32_t)x; else f[i].v.ull = (uint64_t)x;
	}
	return OK;
}

// ---- events: each new value of xid is told xid_times, as a critical Xid (type 8)
struct set { int on[MAXDEV]; };
struct event { void *dev; unsigned long long type, data; unsigned gi, ci; };
API int nvmlEventSetCreate(void **s) { SYS; NEED(s); *s = calloc(1, sizeof(struct set)); return *s ? OK : 20; }
API int nvmlEventSetFree(void *s) { free(s); return OK; }
API int nvmlDeviceRegisterEvents(void *h, unsigned long long types, void *s) { DEV; NEED(s); if (types & 8) ((struct set *)s)->on[d - S.d] = 1; return OK; }
API int nvmlEventSetWait_v2(void *s, struct event *e, unsigned ms) {
	SYS;
	NEED(s && e);
	for (unsigned waited = 0;; waited += 100) {
		refresh();
		for (int i = 0; i < S.count; i++) {
			struct dev *d = &S.d[i];
			if (!((struct set *)s)->on[i]) continue;
			if (!d->xid) { d->xid_told = 0; continue; }
			if (d->xid != d->xid_told) { d->xid_told = d->xid; d->xid_left = d->xid_times; }
			if (d->xid_left <= 0) continue;
			d->xid_left--;
			*e = (struct event){d, 8, (unsigned long long)d->xid, ~0u, ~0u};
			return OK;
		}
		if (waited >= ms) return TIMEOUT;
		nanosleep(&(struct timespec){0, 100000000}, NULL);
	}
}
API int nvmlEventSetWait(void *s, struct event *e, unsigned ms) { return nvmlEventSetWait_v2(s, e, ms); }

// ---- setters
static int keep(struct dev *d, const char *key, const char *value) {
	char path[512];
	FILE *f = fopen(kept(path, sizeof path), "a");
	if (!f) return NO_PERMISSION;
	fprintf(f, "%d.%s = %s\n", (int)(d - S.d), key, value);
	fclose(f);
	set(d, key, value);
	return OK;
}
static int keep_number(struct dev *d, const char *key, long long value) {
	char text[32];
	snprintf(text, sizeof text, "%lld", value);
	return keep(d, key, text);
}
API int nvmlDeviceSetPersistenceMode(void *h, unsigned v) { DEV; NEED(v < 2); return keep_number(d, "persistence", v); }
API int nvmlDeviceSetComputeMode(void *h, unsigned v) { DEV; NEED(v < 4 && v != 1); return keep_number(d, "compute_mode", v); }
API int nvmlDeviceSetPowerManagementLimit(void *h, unsigned v) {
	DEV;
	NEED(v >= d->limit_min_mw && v <= d->limit_max_mw);
	return keep_number(d, "limit_mw", v);
}
API int nvmlDeviceSetEccMode(void *h, unsigned v) {
	DEV;
	NEED(v < 2);
	if (d->ecc_mode < 0) return NOT_SUPPORTED;
	return keep_number(d, "ecc_pending", v);
}

// ---- MIG: profiles of an A100 80 GB, known only while MIG is on. d->mig has the instances, by place: "3g.40gb,,2g.20gb!"
// is two of them, of which the second has no compute instance.
#define PLACES 7
static const struct profile { const char *name; unsigned id, slices, memory, max; } profiles[] = {
	{"1g.10gb", 19, 1, 1, 7}, {"2g.20gb", 14, 2, 2, 3}, {"3g.40gb", 9, 3, 4, 2}, {"4g.40gb", 5, 4, 4, 1}, {"7g.80gb", 0, 7, 8, 1},
};
#define PROFILES (sizeof profiles / sizeof *profiles)
struct place { struct dev *d; int number, compute; }; // one for each GPU instance, one for each compute instance
static struct place places[MAXDEV][PLACES][2];

static void layout_of(struct dev *d, char out[PLACES][16]) {
	memset(out, 0, PLACES * 16);
	const char *s = d->mig;
	for (int i = 0; i < PLACES; i++) {
		size_t length = strcspn(s, ",");
		snprintf(out[i], 16, "%.*s", (int)length, s);
		s += length;
		if (!*s) break;
		s++;
	}
}
static int keep_layout(struct dev *d, char all[PLACES][16]) {
	char text[PLACES * 17] = "";
	for (int i = 0; i < PLACES; i++) {
		if (i) strcat(text, ",");
		strcat(text, all[i]);
	}
	return keep(d, "mig", text);
}
static const struct profile *profile_of(const char *entry) {
	for (size_t i = 0; i < PROFILES; i++)
		if (*entry && !strncmp(entry, profiles[i].name, strlen(profiles[i].name))) return &profiles[i];
	return NULL;
}
static struct place *place(struct dev *d, int number, int compute) {
	struct place *p = &places[d - S.d][number][compute];
	*p = (struct place){d, number, compute};
	return p;
}
static int at(void *h, int compute, struct place **p, char all[PLACES][16]) {
	NEED(h);
	*p = h;
	NEED(*p >= &places[0][0][0] && *p < &places[MAXDEV][0][0] && (*p)->compute == compute);
	struct dev *d;
	int r = get((*p)->d, &d);
	if (r) return r;
	layout_of(d, all);
	return *all[(*p)->number] ? OK : NOT_FOUND;
}
#define MIG_ON do { if (d->mig_mode != 1) return NOT_SUPPORTED; } while (0)
#define IDLE do { if (*d->procs) return IN_USE; } while (0)

API int nvmlDeviceSetMigMode(void *h, unsigned v, unsigned *status) {
	DEV;
	NEED(v < 2 && status);
	if (d->mig_mode < 0) return NOT_SUPPORTED;
	if (v == d->mig_mode) { *status = OK; return OK; }
	IDLE;
	if (!v && strspn(d->mig, ",") != strlen(d->mig)) return IN_USE;
	*status = d->mig_waits ? RESET_REQUIRED : OK;
	return keep_number(d, d->mig_waits ? "mig_pending" : "mig_mode", v);
}
struct gi_profile { unsigned version, id, p2p, slices, max, sm, ce, dec, enc, jpeg, ofa; unsigned long long mib; char name[96]; };
API int nvmlDeviceGetGpuInstanceProfileInfoV(void *h, unsigned number, struct gi_profile *v) {
	DEV;
	NEED(v && number < 18);
	if (v->version != (sizeof *v | 2u << 24)) return VERSION_MISMATCH;
	MIG_ON;
	if (number >= PROFILES) return NOT_SUPPORTED;
	const struct profile *p = &profiles[number];
	memset(v, 0, sizeof *v);
	v->version = sizeof *v | 2u << 24;
	v->id = p->id; v->slices = p->slices; v->max = p->max; v->mib = p->memory * 10240ULL;
	snprintf(v->name, sizeof v->name, "MIG %s", p->name);
	return OK;
}
API int nvmlDeviceGetGpuInstances(void *h, unsigned id, void **out, unsigned *n) {
	DEV;
	NEED(out && n);
	MIG_ON;
	char all[PLACES][16];
	layout_of(d, all);
	*n = 0;
	for (int i = 0; i < PLACES; i++) {
		const struct profile *p = profile_of(all[i]);
		if (p && p->id == id) out[(*n)++] = place(d, i, 0);
	}
	return OK;
}
API int nvmlDeviceCreateGpuInstance(void *h, unsigned id, void **out) {
	DEV;
	NEED(out);
	MIG_ON;
	IDLE;
	char all[PLACES][16];
	layout_of(d, all);
	const struct profile *wanted = NULL;
	unsigned slices = 0, memory = 0;
	int room = -1;
	for (size_t i = 0; i < PROFILES; i++) if (profiles[i].id == id) wanted = &profiles[i];
	NEED(wanted);
	for (int i = 0; i < PLACES; i++) {
		const struct profile *p = profile_of(all[i]);
		if (p) { slices += p->slices; memory += p->memory; } else if (room < 0) room = i;
	}
	if (d->mig_fails || room < 0 || slices + wanted->slices > 7 || memory + wanted->memory > 8) return NO_RESOURCES;
	snprintf(all[room], 16, "%s!", wanted->name);
	*out = place(d, room, 0);
	return keep_layout(d, all);
}
API int nvmlGpuInstanceDestroy(void *gi) {
	struct place *p;
	char all[PLACES][16];
	int r = at(gi, 0, &p, all);
	if (r) return r;
	if (*p->d->procs || !strchr(all[p->number], '!')) return IN_USE;
	*all[p->number] = 0;
	return keep_layout(p->d, all);
}
struct ci_profile { unsigned version, id, slices, max, sm, ce, dec, enc, jpeg, ofa; char name[96]; };
API int nvmlGpuInstanceGetComputeInstanceProfileInfoV(void *gi, unsigned number, unsigned engine, struct ci_profile *v) {
	struct place *p;
	char all[PLACES][16];
	int r = at(gi, 0, &p, all);
	if (r) return r;
	NEED(v && number < 9 && engine == 0);
	if (v->version != (sizeof *v | 2u << 24)) return VERSION_MISMATCH;
	const struct profile *whole = profile_of(all[p->number]);
	if (number >= PROFILES || profiles[number].slices > whole->slices) return NOT_SUPPORTED;
	memset(v, 0, sizeof *v);
	v->version = sizeof *v | 2u << 24;
	v->id = number; v->slices = profiles[number].slices; v->max = whole->slices / v->slices;
	return OK;
}
API int nvmlGpuInstanceGetComputeInstances(void *gi, unsigned id, void **out, unsigned *n) {
	struct place *p;
	char all[PLACES][16];
	int r = at(gi, 0, &p, all);
	if (r) return r;
	NEED(out && n && id < PROFILES);
	*n = 0; // the stand-in's compute instances have all of their GPU instance
	if (!strchr(all[p->number], '!') && profiles[id].slices == profile_of(all[p->number])->slices) out[(*n)++] = place(p->d, p->number, 1);
	return OK;
}
API int nvmlGpuInstanceCreateComputeInstance(void *gi, unsigned id, void **out) {
	struct place *p;
	char all[PLACES][16];
	int r = at(gi, 0, &p, all);
	if (r) return r;
	NEED(out && id < PROFILES);
	char *mark = strchr(all[p->number], '!');
	if (!mark || profiles[id].slices != profile_of(all[p->number])->slices) return NO_RESOURCES;
	*mark = 0;
	*out = place(p->d, p->number, 1);
	return keep_layout(p->d, all);
}
API int nvmlComputeInstanceDestroy(void *ci) {
	struct place *p;
	char all[PLACES][16];
	int r = at(ci, 1, &p, all);
	if (r) return r;
	if (*p->d->procs) return IN_USE;
	strcat(all[p->number], "!");
	return keep_layout(p->d, all);
}
API int nvmlDeviceGetMigDeviceHandleByIndex(void *h, unsigned i, void **out) {
	DEV;
	NEED(out && i < PLACES);
	MIG_ON;
	char all[PLACES][16];
	layout_of(d, all);
	if (!*all[i] || strchr(all[i], '!')) return NOT_FOUND;
	*out = place(d, i, 1);
	return OK;
}
API int nvmlDeviceGetName(void *h, char *o, unsigned n) {
	struct place *p;
	char all[PLACES][16], text[128];
	if (h >= (void *)&places[0][0][0] && h < (void *)&places[MAXDEV][0][0]) {
		int r = at(h, 1, &p, all);
		if (r) return r;
		snprintf(text, sizeof text, "%s MIG %s", p->d->name, all[p->number]);
		return put(o, n, text);
	}
	DEV;
	return put(o, n, d->name);
}
