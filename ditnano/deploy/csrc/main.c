/* Draw images on the command line: see `usage`. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "student.h"

#if STUDENT_CHANNELS != 1 && STUDENT_CHANNELS != 3
#error "PNG and PPM hold images of 1 or 3 channels"
#endif
#ifdef STUDENT_ARRAY
extern const unsigned char student_array[];
#endif

enum { SIZE = STUDENT_IMAGE_SIZE, ROW = STUDENT_IMAGE_SIZE * STUDENT_CHANNELS };

static const char usage[] =
    "usage: student [--weights FILE] [--seeds A or A-B] [--label L] [--guidance G] [--out FILE] [--info]\n"
    "  --weights   student.bin (not needed if the weights are compiled in)\n"
    "  --seeds     0; the images of several seeds stand one below the other\n"
    "  --label     drawn from the seed\n"
    "  --guidance  of the export; 1 is off\n"
    "  --out       image.png; a name that ends in .ppm or .pgm writes that\n"
    "  --info      design and memory, no image\n";

typedef struct {
  const char *weights, *out;
  unsigned long from, to;
  int label, info;
  float guidance;
} Options;

static int fail(const char *what, const char *value, const char *message) {
  fprintf(stderr, "%s: %s; %s\n", what, value, message);
  return 2;
}

/* ---- Options ---------------------------------------------------------------------------------------------------- */

static int read_seeds(const char *text, Options *options) {
  char *end;
  options->from = options->to = strtoul(text, &end, 10);
  if (end != text && *end == '-') {
    const char *second = end + 1;
    options->to = strtoul(second, &end, 10);
    if (end == second) return 0;
  }
  int digits = text[0] >= '0' && text[0] <= '9' && *end == 0;
  return digits && options->from <= options->to && options->to - options->from < 100000 && options->to <= 0xffffffff;
}

static int read_options(int n, char **args, Options *options) {
  for (int i = 1; i < n; i++) {
    const char *name = args[i], *value = i + 1 < n ? args[i + 1] : "";
    char *end = (char *)"";
    if (!strcmp(name, "--info")) {
      options->info = 1;
      continue;
    }
    if (!strcmp(name, "--weights")) options->weights = value;
    else if (!strcmp(name, "--out")) options->out = value;
    else if (!strcmp(name, "--label")) {
      long label = strtol(value, &end, 10);
      if (label != (int)label) return fail(name, value, "expected a label");
      options->label = (int)label;
    }
    else if (!strcmp(name, "--guidance")) options->guidance = strtof(value, &end);
    else if (!strcmp(name, "--seeds")) {
      if (!read_seeds(value, options)) return fail("seeds", value, "expected A or A-B, at most 100,000 of them");
    } else {
      fputs(usage, !strcmp(name, "--help") ? stdout : stderr);
      return !strcmp(name, "--help") ? -1 : 2;
    }
    if (*end || !*value) return fail(name, value, "expected a value");
    i++;
  }
  return 0;
}

/* ---- Pictures --------------------------------------------------------------------------------------------------- */

static uint32_t crc_add(uint32_t crc, const uint8_t *data, size_t n) {
  for (size_t i = 0; i < n; i++) {
    crc ^= data[i];
    for (int k = 0; k < 8; k++) crc = crc & 1 ? 0xedb88320u ^ (crc >> 1) : crc >> 1;
  }
  return crc;
}

typedef struct {
  FILE *file;
  uint32_t crc, low, high; /* of the chunk, and Adler's two sums of the rows */
} Png;

static void put(Png *png, const uint8_t *data, size_t n) {
  fwrite(data, 1, n, png->file);
  png->crc = crc_add(png->crc, data, n);
}

static void put_number(Png *png, uint32_t a) {
  const uint8_t bytes[4] = {(uint8_t)(a >> 24), (uint8_t)(a >> 16), (uint8_t)(a >> 8), (uint8_t)a};
  put(png, bytes, 4);
}

static void begin_chunk(Png *png, uint32_t bytes, const char *name) {
  put_number(png, bytes);
  png->crc = 0xffffffffu;
  put(png, (const uint8_t *)name, 4);
}

static void end_chunk(Png *png) { put_number(png, ~png->crc); }

/* The rows are stored as they are: deflate has a form for that, a block for each row. */
static void write_png(FILE *file, const uint8_t *pixels, uint32_t rows) {
  Png png = {file, 0, 1, 0};
  put(&png, (const uint8_t *)"\x89PNG\r\n\x1a\n", 8);
  begin_chunk(&png, 13, "IHDR");
  put_number(&png, SIZE);
  put_number(&png, rows);
  put(&png, (const uint8_t[]){8, STUDENT_CHANNELS == 3 ? 2 : 0, 0, 0, 0}, 5);
  end_chunk(&png);
  begin_chunk(&png, 2 + rows * (5 + 1 + ROW) + 4, "IDAT");
  put(&png, (const uint8_t *)"\x78\x01", 2);
  for (uint32_t r = 0; r < rows; r++) {
    const uint16_t n = 1 + ROW, no = (uint16_t)~n;
    const uint8_t head[6] = {r + 1 == rows, (uint8_t)n, (uint8_t)(n >> 8), (uint8_t)no, (uint8_t)(no >> 8), 0};
    put(&png, head, 6);
    put(&png, pixels + (size_t)r * ROW, ROW);
    png.high = (png.high + png.low) % 65521; /* the filter byte 0 of the row */
    for (int i = 0; i < ROW; i++) {
      png.low = (png.low + pixels[(size_t)r * ROW + (size_t)i]) % 65521;
      png.high = (png.high + png.low) % 65521;
    }
  }
  put_number(&png, png.high << 16 | png.low);
  end_chunk(&png);
  begin_chunk(&png, 0, "IEND");
  end_chunk(&png);
}

static int write_picture(const char *path, const uint8_t *pixels, uint32_t rows) {
  size_t n = strlen(path);
  int is_png = n > 4 && !strcmp(path + n - 4, ".png");
  FILE *file = fopen(path, "wb");
  if (!file) return fail("out", path, "cannot be written");
  if (is_png) {
    write_png(file, pixels, rows);
  } else {
    fprintf(file, "P%d\n%d %lu\n255\n", STUDENT_CHANNELS == 3 ? 6 : 5, SIZE, (unsigned long)rows);
    fwrite(pixels, 1, (size_t)rows * ROW, file);
  }
  int failed = ferror(file);
  if (fclose(file) || failed) {
    remove(path);
    return fail("out", path, "could not be written whole");
  }
  return 0;
}

/* ---- The program ------------------------------------------------------------------------------------------------ */

static StudentError open_student(Student **student, const char *weights) {
#ifdef STUDENT_ARRAY
  if (!weights) {
    void *memory = malloc(student_memory()); /* given back when the program ends */
    return student_open(student, student_array, student_weights_bytes(), memory, student_memory());
  }
#endif
  return student_load(student, weights ? weights : "student.bin");
}

static double seconds(void) {
  struct timespec now;
  timespec_get(&now, TIME_UTC);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int n, char **args) {
  Options options = {NULL, "image.png", 0, 0, STUDENT_ANY_LABEL, 0, STUDENT_GUIDANCE};
  int stop = read_options(n, args, &options);
  if (stop) return stop < 0 ? 0 : stop;
  printf("depth %d, width %d, %dx%d pixels, %d classes; ", STUDENT_DEPTH, STUDENT_WIDTH, SIZE, SIZE, STUDENT_CLASSES);
  printf("weights %.1f kB, scratch %.1f kB\n", (double)student_weights_bytes() / 1000, (double)student_memory() / 1000);
  if (options.info) return 0;
  Student *student;
  StudentError error = open_student(&student, options.weights);
  if (error) return fail("weights", options.weights ? options.weights : "student.bin", student_message(error));
  size_t images = options.to - options.from + 1;
  uint8_t *pixels = malloc(images * STUDENT_PIXELS);
  if (!pixels) return fail("seeds", "too many", "expected fewer for this memory");
  double start = seconds();
  for (size_t i = 0; i < images && !error; i++)
    error = student_draw(student, (uint32_t)(options.from + i), options.label, options.guidance,
                         pixels + i * STUDENT_PIXELS);
  double each = (seconds() - start) / (double)images;
  stop = error ? fail("label or guidance", "refused", student_message(error))
               : write_picture(options.out, pixels, (uint32_t)(images * SIZE));
  if (!stop) printf("%s: %lu images, %.2f ms each\n", options.out, (unsigned long)images, 1e3 * each);
  free(pixels);
  student_close(student);
  return stop;
}
